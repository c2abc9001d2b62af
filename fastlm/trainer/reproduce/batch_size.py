"""How many updates a larger batch saves."""

import math
from itertools import pairwise
from statistics import mean

from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import draw_lines, held_out, learner, spread
from fastlm.trainer.step import Trainer

ROWS = (8, 16, 32, 64)  # of a batch
LR = 2e-3  # of the smallest
RULES = {"square root": 0.5, "linear": 1.0}  # the power of the batch's size that the rate grows with
GOAL = 0.83  # of the loss of guessing by frequency
MOST, CLIMB, EVERY = 600, 10, 4  # updates: of a run, of its climb, and between two looks at held-out text


class BatchSize(Experiment, name="batch-size"):
    of = "McCandlish et al. 2018, and Shallue et al. 2019, fig. 1: updates to a loss, by the batch's size"
    limits = (
        "Rates follow by two rules from one; Shallue et al. tune each size's own, without which a failing rule looks "
        "like a batch that does not pay. The loss is one that is soon reached: the lower it is, the larger are the "
        "batches that still pay (McCandlish et al. 2018). The climb is of ten updates, whatever the batch."
    )

    def run(self, setting: Setting) -> Finding:
        goal = GOAL * setting.tokens.facts.unigram_nats
        smallest, largest = ROWS[0], ROWS[-1]
        least = self._needed(setting, smallest, LR, goal)
        needed = {rule: {smallest: least} for rule in RULES}
        for rule, power in RULES.items():
            for rows in ROWS[1:]:
                needed[rule][rows] = self._needed(setting, rows, LR * (rows / smallest) ** power, goal)
        times, alone = largest // smallest, mean(least)
        in_proportion = lambda n: f"{alone * smallest / n:.0f}" if math.isfinite(alone) else "-"
        rows = [(f"{n}", *(_words(needed[rule][n]) for rule in RULES), in_proportion(n)) for n in ROWS]
        claims = [claim for rule in RULES for claim in _claims(rule, needed[rule], times)]
        columns = ("rows of a batch", *(f"updates, {rule} rate" for rule in RULES), "if they fell as batches grow")
        draw = lambda figure: _draw(figure, needed, goal)
        return Finding(columns, rows, claims, draw, {"needed": needed, "goal": goal})

    def _needed(self, setting: Setting, rows: int, lr: float, goal: float) -> list[float]:
        steps, found = setting.steps(MOST), []
        options = dict(batch=rows, lr=lr, schedule="constant", warmup=min(1.0, CLIMB / steps))
        for seed in setting.seeds:
            found.append(updates_to(learner(setting, steps, seed, **options), goal))
            setting.say(f"{rows} rows at {lr:.4f}, seed {seed}: {_words(found[-1:])}")
        return found


def updates_to(trainer: Trainer, goal: float) -> float:
    """After how many updates the held-out loss is no higher than the goal, at one of the looks at it; inf if never."""
    while trainer.step < trainer.steps:
        trainer.update()
        if trainer.step % EVERY == 0 and held_out(trainer) <= goal:
            return trainer.step
    return math.inf


def _words(updates: list[float]) -> str:
    missed = sum(map(math.isinf, updates))
    return f"not there in {missed} of {len(updates)}" if missed else spread(updates, 0)


def _claims(rule: str, needed: dict[int, list[float]], times: int) -> list[Claim]:
    means = [mean(needed[rows]) for rows in ROWS]
    reached = math.isfinite(sum(means))
    left = [after / before for before, after in pairwise(means)] if reached else []
    saved = f" ({means[0] / means[-1]:.1f} times fewer)" if reached else ""
    pairs = zip(needed[ROWS[0]], needed[ROWS[-1]], strict=True)
    return [
        Claim(
            f"{rule.capitalize()} rate: each doubling of the batch needs fewer updates, in the mean of the seeds.",
            reached and max(left) < 1,
        ),
        Claim(
            f"{rule.capitalize()} rate: {times} times the batch needs more than 1/{times} of the updates, with every "
            f"seed{saved}.",
            reached and all(times * after > before for before, after in pairs),
        ),
        Claim(
            f"{rule.capitalize()} rate: the last doubling saves a smaller share than the first, in the mean.",
            reached and left[0] < left[-1],
        ),
    ]


def _draw(figure, needed: dict[str, dict[int, list[float]]], goal: float) -> None:
    axes = figure.subplots()
    draw_lines(axes, ROWS, {f"{rule} rate": list(zip(*found.values(), strict=True)) for rule, found in needed.items()})
    first = mean(next(iter(needed.values()))[ROWS[0]])
    if math.isfinite(first):
        axes.plot(ROWS, [first * ROWS[0] / rows for rows in ROWS], "--", color="0.7", label="as batches grow")
    axes.set(xlabel="rows of a batch", ylabel=f"updates to {goal:.2f} nats per token")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.legend()

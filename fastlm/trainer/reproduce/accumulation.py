"""Micro-batches that make the gradient of one large batch, and averages of their means, which do not."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.trainer.evaluation import total
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import learner, spread
from fastlm.trainer.step import Trainer

ROWS = 16
CUTS = (2, 4, 8, 16)  # micro-batches


class Accumulation(Experiment, name="accumulation"):
    of = "gradient accumulation, 10 times 800 rows as one batch of 8000; the mean of means of transformers until 2024"
    limits = (
        "This compares gradients of a first update, in fp32. It says nothing of what a wrong average costs in the end."
    )

    def run(self, setting: Setting) -> Finding:
        gaps: dict[str, dict[int, list[float]]] = {"sums": {}, "means": {}}
        for seed in setting.seeds:
            trainer = learner(setting, 2, seed, preset="bert", batch=ROWS, context=64)
            whole = gradient(trainer, 1, of_sums)
            for cuts in CUTS:
                for name, of in (("sums", of_sums), ("means", of_means)):
                    gap = (gradient(trainer, cuts, of) - whole).norm() / whole.norm()
                    gaps[name].setdefault(cuts, []).append(gap.item())
            setting.say(f"seed {seed}: sums {gaps['sums'][ROWS][-1]:.1e}, means {gaps['means'][ROWS][-1]:.1e}")
        rows = [
            (f"{cuts} of {ROWS // cuts}", *(spread([1e6 * x for x in gaps[name][cuts]], 2) for name in gaps))
            for cuts in CUTS
        ]
        worst = max(max(values) for values in gaps["sums"].values())
        claims = [
            Claim(
                f"Sums over the targets of all rows make one gradient however they are cut ({worst:.0e}).", worst < 1e-5
            ),
            Claim(
                "Means of micro-batches of a row each, averaged, are another gradient, by a thousandth or more.",
                min(gaps["means"][ROWS]) > 1e-3,
            ),
        ]
        columns = ("micro-batches", "sums: relative gap, millionths", "means of means: relative gap, millionths")
        return Finding(columns, rows, claims, lambda figure: _draw(figure, gaps), {"gaps": gaps})


Weigh = Callable[[Trainer, dict[str, Tensor], dict[str, int], dict[str, int], int], Tensor]


def of_sums(trainer: Trainer, sums: dict[str, Tensor], mine: dict[str, int], all_: dict[str, int], cuts: int) -> Tensor:
    """Each term over its targets in all micro-batches."""
    return trainer.train.means(sums, all_)["loss"]


def of_means(
    trainer: Trainer, sums: dict[str, Tensor], mine: dict[str, int], all_: dict[str, int], cuts: int
) -> Tensor:
    """Each term over its targets in this one, and the average of those."""
    return trainer.train.means(sums, mine)["loss"] / cuts


def gradient(trainer: Trainer, cuts: int, weigh: Weigh) -> Tensor:
    """Of the first rows in so many micro-batches, all parameters' in one fp64 vector."""
    size = ROWS // cuts
    batches = [trainer.train.batch(trainer.config.seed, first, size) for first in range(0, ROWS, size)]
    counts = [trainer.train.targets(batch) for batch in batches]
    trainer.model.zero_grad(set_to_none=True)
    for batch, mine in zip(batches, counts, strict=True):
        weigh(trainer, trainer.train.loss(trainer.model, batch), mine, total(counts), cuts).backward()
    return torch.cat([p.grad.double().flatten() for p in trainer.model.parameters() if p.grad is not None])


def _draw(figure, gaps: dict[str, dict[int, list[float]]]) -> None:
    axes = figure.subplots()
    for found, label in zip(gaps.values(), ("sums over all targets", "means of means"), strict=True):
        axes.plot(list(found), [sum(values) / len(values) for values in found.values()], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="micro-batches", ylabel="relative gap to one large batch")
    axes.legend()

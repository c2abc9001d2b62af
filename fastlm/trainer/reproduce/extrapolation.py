"""Rows that are longer than those a model was trained on, by positional scheme."""

from dataclasses import replace

import torch

from fastlm.models import Transformer
from fastlm.objectives import Causal
from fastlm.trainer.data.tokenizer import vocabulary
from fastlm.trainer.evaluation import Evaluation
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import (
    SMALL,
    Learned,
    draw_lines,
    learned,
    learner,
    of_seeds,
    shape,
    spread,
)
from fastlm.trainer.step import Trainer

STEPS, TRAINED = 300, SMALL["context"]
TIMES = (1, 2, 4, 8)
SCHEMES = ("sinusoidal", "rope", "alibi", "t5", "kerple")
LOOKED_AT = 8192  # tokens of held-out text, the same for each length
ROW_TOKENS = SMALL["batch"] * SMALL["context"]  # of a batch
TUNED = 0.2  # of the updates, on rows of the longer length


class Extrapolation(Experiment, name="extrapolation"):
    of = "Press et al. 2022, fig. 1; Chen et al. 2023, table 2: loss by the length of a row, beyond the trained one"
    limits = (
        "A model of two layers trained on rows of 32 tokens looks at little but its neighbours. What is shown is which "
        "schemes break beyond the trained length; not that one of them makes use of a longer row, which takes a larger "
        "model and text with something far away to see. What was tuned has seen a fifth more updates than the others."
    )

    def run(self, setting: Setting) -> Finding:
        steps = setting.steps(STEPS)
        runs = {
            name: of_seeds(
                setting, steps, name, shape=scheme_shape(setting, name), context=TRAINED, batch=ROW_TOKENS // TRAINED
            )
            for name in SCHEMES
        }
        losses = {name: [[at_length(run.trainer, TRAINED * n) for n in TIMES] for run in runs[name]] for name in runs}
        losses["rope, interpolated"] = [self._interpolated(run) for run in runs["rope"]]
        losses["rope, interpolated and tuned"] = [self._tuned(setting, run) for run in runs["rope"]]
        columns = ("scheme", *(f"{TRAINED * n} tokens" for n in TIMES))
        rows = [(name, *map(spread, zip(*found, strict=True))) for name, found in losses.items()]
        rise = {name: [found[-1] - found[0] for found in several] for name, several in losses.items()}
        claims = [
            Claim(
                f"{name}: at {TIMES[-1]} times the length every seed's loss is no higher than at that one.",
                max(rise[name]) <= 0,
            )
            for name in ("alibi", "t5", "kerple")
        ] + [
            Claim(f"{name}: every seed's loss is higher there, by 0.1 nats or more.", min(rise[name]) > 0.1)
            for name in ("sinusoidal", "rope")
        ]
        claims += [
            Claim(
                f"{name}: every seed's loss rises less than any of sinusoidal or rope.",
                max(rise[name]) < min(rise["sinusoidal"] + rise["rope"]),
            )
            for name in ("alibi", "t5", "kerple")
        ]
        for name, how in (
            ("rope, interpolated", "as they are"),
            ("rope, interpolated and tuned", "after a few updates"),
        ):
            better = all(a[-1] < b[-1] for a, b in zip(losses[name], losses["rope"], strict=True))
            claims.append(Claim(f"Interpolated positions lower rope's loss at {TIMES[-1]} times, {how}.", better))
        return Finding(columns, rows, claims, lambda figure: _draw(figure, losses), {"losses": losses})

    def _interpolated(self, run: Learned) -> list[float]:
        return [at_length(run.trainer, TRAINED * n, scaling=n) for n in TIMES]

    def _tuned(self, setting: Setting, run: Learned) -> list[float]:
        """The same after a few updates at each length, at a lower rate (Chen et al. 2023)."""
        found = [at_length(run.trainer, TRAINED)]
        for n in TIMES[1:]:
            longer = scheme_shape(setting, "rope") | {"context": TRAINED * n, "position_options": interpolated(n)}
            flags = dict(shape=longer, context=TRAINED * n, batch=max(1, ROW_TOKENS // (TRAINED * n)), lr=1e-3)
            tuned = learner(setting, setting.steps(TUNED * STEPS), run.trainer.config.seed, **flags)
            tuned.model.load_state_dict(run.trainer.model.state_dict())
            found.append(at_length(learned(tuned).trainer, TRAINED * n))
        return found


def interpolated(n: int) -> dict:
    """Options of a rotary scheme whose positions are divided by n."""
    return {"scaling": {"kind": "interpolate", "factor": float(n)}}


def scheme_shape(setting: Setting, name: str) -> dict:
    """Where positions are added to embeddings, these are multiplied by √dim first (Vaswani et al. 2017)."""
    return shape(setting, context=TRAINED, position=name, scale_embedding=name == "sinusoidal")


def at_length(trainer: Trainer, length: int, scaling: int = 1) -> float:
    """The held-out loss in rows of such a length, nats per token. scaling: what rotary positions are divided by."""
    options = trainer.shape.position_options
    if scaling > 1:
        options = options | interpolated(scaling)
    model = Transformer(replace(trainer.shape, context=length, position_options=options))
    model.load_state_dict(trainer.model.state_dict())
    objective = Causal(trainer.held_out.tokens[: LOOKED_AT + 1], length, vocabulary(trainer.tokenizer))
    return Evaluation(objective, max(1, ROW_TOKENS // length), torch.device("cpu")).of(model)["loss"]


def _draw(figure, losses: dict[str, list[list[float]]]) -> None:
    axes = figure.subplots()
    lengths = [TRAINED * n for n in TIMES]
    draw_lines(axes, lengths, losses)
    axes.axvline(TRAINED, color="0.7", linestyle="--")
    axes.set_xscale("log")
    axes.minorticks_off()  # which a logarithmic axis labels
    axes.set(xlabel="tokens of a row", ylabel="nats per token", xticks=lengths, xticklabels=lengths)
    axes.legend()

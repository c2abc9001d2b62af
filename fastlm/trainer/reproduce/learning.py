"""Small models that learn, for experiments that compare how they do."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, stdev

from fastlm.models.presets import FAMILIES
from fastlm.objectives import Objective
from fastlm.trainer.options.config import Config
from fastlm.trainer.outputs.artefacts import smooth
from fastlm.trainer.reproduce.experiment import Setting
from fastlm.trainer.step import Trainer

LOOKED_AT = 128  # windows of held-out text
# two layers, which do an update of 16 rows in some 20 ms of one core
SMALL = dict(preset="gpt", position="rope", context=32, dim=64, layers=2, heads=4, batch=16, threads=1, lr=4e-3)


@dataclass
class Learned:
    """A model that learned. losses: of its updates; held_out: at the end; inf where it diverged."""

    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    held_out: float = math.inf

    def smoothed(self) -> list[float]:
        return smooth(self.losses, max(1, len(self.losses) // 20))


def shape(setting: Setting, **changes: object) -> dict:
    """SMALL's model with other fields of a `ModelConfig`, to be given as a shape."""
    sizes = {name: SMALL[name] for name in ("position", "context", "dim", "layers", "heads")}
    return asdict(replace(FAMILIES[SMALL["preset"]], vocab_size=setting.tokens.facts.vocab_size, **sizes | changes))


def learner(setting: Setting, steps: int, seed: int, **flags: object) -> Trainer:
    """A small model before its first update; flags: what differs from SMALL."""
    config = Config(**SMALL | dict(steps=steps, seed=seed) | flags)
    return Trainer(config.settled(), setting.tokens, steps)


def learned(trainer: Trainer) -> Learned:
    """The same after its last update, or after the first whose loss is not finite."""
    result = Learned(trainer)
    while trainer.step < trainer.steps:
        result.losses.append(trainer.update().losses["loss"].item())
        if not math.isfinite(result.losses[-1]):
            return result
    result.held_out = held_out(trainer)
    return result


def held_out(trainer: Trainer, objective: Objective | None = None) -> float:
    """A model's loss over a part of the held-out text, inf where it is no number. objective: over that text, where it
    is not the trainer's.
    """
    asked = trainer.held_out if objective is None else objective
    found = looked_at(trainer, asked)[asked.compared]
    return found if math.isfinite(found) else math.inf


def looked_at(trainer: Trainer, objective: Objective) -> dict[str, float]:
    """What `Evaluation` finds over a part of an objective's text."""
    evaluation = replace(trainer.evaluation, objective=objective, bytes_of=None)
    return evaluation.of(trainer.model, min(LOOKED_AT, objective.windows))


def of_seeds(setting: Setting, steps: int, what: str, **flags: object) -> list[Learned]:
    """One for each seed."""
    found = []
    for seed in setting.seeds:
        found.append(learned(learner(setting, steps, seed, **flags)))
        setting.say(f"{what}, seed {seed}: {found[-1].held_out:.3f}")
    return found


def losses_of(runs: Sequence[Learned]) -> list[float]:
    return [run.held_out for run in runs]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and one standard deviation between seeds where there are several."""
    if not all(map(math.isfinite, values)):
        return f"diverged in {sum(not math.isfinite(x) for x in values)} of {len(values)}"
    beside = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{beside}"


def clearly_below(lower: Sequence[float], upper: Sequence[float]) -> bool:
    """Whether every seed's value is below every one of the others'."""
    return max(lower) < min(upper)


def lower_in_mean(lower: Sequence[float], upper: Sequence[float]) -> bool:
    """Whether the mean over the seeds is no higher than the others'."""
    return mean(lower) <= mean(upper)


def draw_lines(axes, places: Sequence[float], several: dict[str, list[Sequence[float]]]) -> None:
    """The mean of each at some places, with what lies between its seeds; several: name → the values of each seed."""
    for i, (name, seeds) in enumerate(several.items()):
        columns = list(zip(*seeds, strict=True))
        axes.plot(places, [*map(mean, columns)], "o-", color=f"C{i}", label=name)
        axes.fill_between(places, [*map(min, columns)], [*map(max, columns)], color=f"C{i}", alpha=0.2, linewidth=0)


def draw_dots(axes, several: dict[str, Sequence[float]], label: str) -> None:
    """A line for each name, with a dot for each seed and a stroke at the mean."""
    for i, values in enumerate(several.values()):
        axes.plot(values, [i] * len(values), "o", color=f"C{i}")
        axes.plot([mean(values)] * 2, [i - 0.3, i + 0.3], color=f"C{i}")
    axes.set(xlabel=label, yticks=range(len(several)), yticklabels=list(several))
    axes.invert_yaxis()


def draw_curves(axes, runs: dict[str, list[Learned]], label: str = "nats per token") -> None:
    """The mean training loss of each by updates, smoothed, with what lies between its seeds."""
    for i, (name, several) in enumerate(runs.items()):
        curves = [run.smoothed() for run in several]
        length = min(map(len, curves))
        columns = list(zip(*(curve[:length] for curve in curves), strict=True))
        steps = range(1, length + 1)
        axes.plot(steps, [mean(column) for column in columns], color=f"C{i}", label=name)
        axes.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=f"C{i}", alpha=0.2, linewidth=0)
    axes.set(xlabel="updates", ylabel=label)
    axes.legend()

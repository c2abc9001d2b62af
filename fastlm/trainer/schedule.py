"""Learning-rate schedules: the factor on the peak rate as a pure function of the step, so that resuming needs no state.

Steps count from 0 to steps - 1. Every schedule climbs linearly over the first `warmup` steps, starting above zero, so
that no step is wasted, and reaches the peak at step warmup - 1; then its own curve leads from 1 to
`min_lr_ratio`. To add one, write a function of progress in [0, 1) and decorate it.
"""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {}


def schedule(curve: Callable[[float], float]) -> Callable[[float], float]:
    SCHEDULES[curve.__name__] = curve
    return curve


@schedule
def cosine(progress: float) -> float:
    """Half a cosine (Loshchilov & Hutter 2017), GPT-3's schedule with min_lr_ratio 0.1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@schedule
def linear(progress: float) -> float:
    """A straight line down, BERT's after its warmup."""
    return 1 - progress


@schedule
def constant(progress: float) -> float:
    return 1.0


def factor(name: str, step: int, steps: int, warmup: int, min_lr_ratio: float) -> float:
    """What the peak learning rate is multiplied by at `step` of `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    curve = SCHEDULES[name]((step - warmup) / max(1, steps - warmup))
    return min_lr_ratio + (1 - min_lr_ratio) * curve

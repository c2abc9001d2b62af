"""Learning-rate schedules: the factor on the peak rate as a pure function of the moment, so that resuming needs no
state.

A curve is a function of a `Moment`, and of options that have defaults. Unless it has a climb of its own, the rate first
climbs linearly over the warmup, from above zero, so that no update is wasted, to the peak at the warmup's last update;
the curve leads on from there. (transformers and fairseq begin at zero, and are one update behind on the climb.) What
falls to zero elsewhere falls to `floor` here; what never ends stays above it. To add a curve, decorate it with its
name.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

from fastlm.checks import at_least_zero, one_of, positive, share, whole


class Moment(NamedTuple):
    """How far a run is, in updates, or in tokens where updates differ in size.

    Args:
        done: before this update.
        after: with this update.
        total: of the whole run.
        warmup: of its beginning.
        floor: the share of the peak rate at which the schedule ends.
    """

    done: float
    after: float
    total: float
    warmup: float
    floor: float

    def progress(self, until: float = 1.0) -> float:
        """From 0 after the warmup to 1 at this share of the run, and from there on."""
        return min(1.0, (self.done - self.warmup) / max(1.0, until * self.total - self.warmup))

    @property
    def climb(self) -> float:
        """From above 0 to 1 at the warmup's last update, and from there on."""
        return min(1.0, self.after / self.warmup) if self.warmup else 1.0

    def fallen(self, left: float) -> float:
        """From the peak, where 1 is left of the way down, to the floor, where 0 is."""
        return self.floor + (1 - self.floor) * left


Curve = Callable[..., float]
SCHEDULES: dict[str, Curve] = {}


def schedule(name: str, climbs: bool = True) -> Callable[[Curve], Curve]:
    """Register a curve. climbs: whether the linear climb comes before it; else it is the whole run's."""

    def register(curve: Curve) -> Curve:
        @functools.wraps(curve)
        def after_climb(at: Moment, **options: object) -> float:
            return at.climb if at.done < at.warmup else curve(at, **options)

        SCHEDULES[name] = after_climb if climbs else curve
        return curve

    return register


def defaults(name: str) -> dict[str, object]:
    """A curve's options."""
    _, *options = inspect.signature(SCHEDULES[name]).parameters.values()
    return {option.name: option.default for option in options}


# ---------------------------------------------------------------------------------------------------------------------
# Curves that end with the run


@schedule("cosine")
def cosine(at: Moment, until: float = 1.0) -> float:
    """Half a cosine (Loshchilov & Hutter 2017). GPT-3's has ended by 260 of its 300 billion tokens."""
    return at.fallen(0.5 * (1 + math.cos(math.pi * at.progress(until))))


@schedule("linear")
def linear(at: Moment, until: float = 1.0) -> float:
    """A straight line from the peak down, as in transformers and fairseq; BERT's own is `bert`."""
    return at.fallen(1 - at.progress(until))


@schedule("polynomial")
def polynomial(at: Moment, power: float = 2.0, until: float = 1.0) -> float:
    positive(power=power)
    return at.fallen((1 - at.progress(until)) ** power)


@schedule("constant")
def constant(at: Moment) -> float:
    return 1.0


@schedule("cosine-restarts")
def cosine_restarts(at: Moment, cycles: int = 2) -> float:
    """So many halves of a cosine, each from the peak again (Loshchilov & Hutter 2017, eq. 5 with one length)."""
    whole(1, cycles=cycles)
    return at.fallen(0.5 * (1 + math.cos(math.pi * (cycles * at.progress() % 1.0))))


SHAPES = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: 0.5 + math.cos(math.pi * x) / 2,
}


@schedule("wsd")
def wsd(at: Moment, decay: float = 0.2, shape: str = "linear") -> float:
    """Warmup, stable, decay (Hu et al. 2024): the peak rate up to the run's last share `decay`, and then down to the
    floor in one of SHAPES (Hägele et al. 2024).
    """
    share(decay=decay), one_of(SHAPES, shape=shape)
    began = (1 - decay) * at.total
    return at.fallen(SHAPES[shape](max(0.0, at.done - began) / max(1.0, at.total - began)))


@schedule("bert")
def bert(at: Moment) -> float:
    """A line from the peak at the first update (Devlin et al. 2019's code), which the climb hides at its beginning: the
    rate drops a little where the climb ends.
    """
    return at.fallen(1 - at.done / at.total)


@schedule("electra", climbs=False)
def electra(at: Moment) -> float:
    """The climb times that line (Clark et al. 2020's code), which never reaches the peak."""
    return at.climb * bert(at)


@schedule("slanted-triangular", climbs=False)
def slanted_triangular(at: Moment) -> float:
    """From the floor up to the peak, and back (Howard & Ruder 2018, eq. 3; their ratio is 1 / floor, 32)."""
    return at.fallen(at.done / at.warmup if at.done < at.warmup else 1 - at.progress())


# ---------------------------------------------------------------------------------------------------------------------
# Curves that know of no end


@schedule("noam")
def noam(at: Moment) -> float:
    """√(warmup / n) at the n-th update (Vaswani et al. 2017, eq. 3); the peak rate there is (dim · warmup)^-½."""
    return max(at.floor, math.sqrt(max(1.0, at.warmup) / at.after))


@schedule("inverse-sqrt")
def inverse_sqrt(at: Moment, timescale: float = 0.0) -> float:
    """√(timescale / (timescale + updates since the warmup)), as in transformers; 0 makes the warmup its timescale, as
    in fairseq, or 10,000 updates where there is none.
    """
    at_least_zero(timescale=timescale)
    scale = timescale or at.warmup or 10_000
    return max(at.floor, math.sqrt(scale / (at.done - at.warmup + scale)))


@schedule("t5", climbs=False)
def t5(at: Moment) -> float:
    """1 / √max(n, warmup) over its peak (Raffel et al. 2020, sec. 3.1.2): level over the warmup, no climb."""
    return max(at.floor, math.sqrt(max(1.0, at.warmup) / max(1.0, at.done, at.warmup)))


@schedule("exponential")
def exponential(at: Moment, end: float = 0.01) -> float:
    """By the same factor at each update, down to `end` at the last."""
    share(end=end)
    return max(at.floor, end ** at.progress())


@schedule("step")
def step(at: Moment, every: float = 1 / 3, factor: float = 0.1) -> float:
    """Multiplied by a factor each time such a share of what follows the warmup is over."""
    positive(every=every), share(factor=factor)
    return max(at.floor, factor ** int(at.progress() / every + 1e-9))

"""How fastlm is timed: one process, rounds that interleave all contestants in a fresh random order, medians with their
spread.

A ratio is taken within each round, peer's time over ours, and the median of those ratios is reported with its 20th and
80th percentiles; a difference counts only where that interval leaves out 1. "null" is our own function entered a second
time: its spread is the noise of the measurement. Four clocks:

    clock    perf_counter around a batch of calls; for CPUs
    process  process_time, likewise: one thread's work on a CPU that others use too
    events   CUDA events around a batch of calls: what a training loop sees, the host's work too where it is the limit
    graph    CUDA events around the replay of a graph holding a batch of calls: the device's work alone

A contestant is a list of calls over separate buffers, taken in turn: a kernel that waits for memory must not find its
data in the cache, so such lists cover more than four caches. Results are checked before anything is timed, by the
callers.
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice

import torch

NULL = "null"
BATCH = 0.02  # seconds of work between two readings of a clock, at least
MOST_CALLS = 200  # in one batch
FEWEST_ROUNDS = 5

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: list[float]) -> "Spread":
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Spread(statistics.median(samples), fifths[0], fifths[3])


@dataclass(frozen=True)
class Comparison:
    """seconds: of one call. ratio: of each contestant's time to the first's, "null" included. left_out: who could not
    run, and why.
    """

    clock: str
    rounds: int
    seconds: dict[str, Spread]
    ratio: dict[str, Spread]
    left_out: dict[str, str]

    def row(self, **facts) -> dict:
        """For JSON: what was compared, and the result."""
        return facts | asdict(self)


def compare(
    contestants: dict[str, Callable[[], Calls]],
    clock: str,
    rounds: int = 30,
    budget: float = 20.0,
    batch: float = BATCH,
) -> Comparison:
    """Time every contestant, given as a function that sets it up; the first is ours.

    budget: seconds after which no round is begun, once a few are done. A peer that raises is left out, with its reason.
    """
    ours = next(iter(contestants))
    timers, left_out = {}, {}
    for name, set_up in contestants.items():
        try:
            timers[name] = CLOCKS[clock](set_up(), batch)
        except Exception as error:  # a peer's compiler or kernel may raise anything; ours may not
            if name == ours:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    timers[NULL] = timers[ours]
    samples = {name: [] for name in timers}
    order, shuffler = list(timers), random.Random(0)
    end = time.monotonic() + budget
    while len(samples[ours]) < rounds and (len(samples[ours]) < FEWEST_ROUNDS or time.monotonic() < end):
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(timers[name]())
    ratios = {
        name: [t / t_ours for t, t_ours in zip(ts, samples[ours], strict=True)]
        for name, ts in samples.items()
        if name != ours
    }
    seconds = {name: Spread.of(ts) for name, ts in samples.items()}
    return Comparison(
        clock, len(samples[ours]), seconds, {name: Spread.of(rs) for name, rs in ratios.items()}, left_out
    )


def run_all(calls: Calls, n: int) -> None:
    for call in islice(cycle(calls), n):
        call()


def batch_size(calls: Calls, once: Callable[[int], float], batch: float) -> int:
    """How many calls fill a batch, a multiple of len(calls) so that every buffer has its turn. once(n): seconds for n
    calls.
    """
    run_all(calls, 2 * len(calls))  # warm-up
    each = once(len(calls)) / len(calls)
    wanted = min(MOST_CALLS, max(1, math.ceil(batch / each)))
    return len(calls) * math.ceil(wanted / len(calls))


def clock(calls: Calls, batch: float = BATCH, now: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    def once(n: int) -> float:
        start = now()
        run_all(calls, n)
        return now() - start

    n = batch_size(calls, once, batch)
    return lambda: once(n) / n


def between_events(work: Callable[[], object]) -> float:
    """Seconds of device time from before work's first kernel to after its last."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def events(calls: Calls, batch: float = BATCH) -> Callable[[], float]:
    once = lambda n: between_events(lambda: run_all(calls, n))
    n = batch_size(calls, once, batch)
    return lambda: once(n) / n


def graph(calls: Calls, batch: float = BATCH) -> Callable[[], float]:
    """Forward and backward of what is captured must run on one stream: make the current stream a side stream first."""
    n = batch_size(calls, lambda n: between_events(lambda: run_all(calls, n)), batch)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
        run_all(calls, n)
    captured.replay()
    return lambda: between_events(captured.replay) / n


CLOCKS = {"clock": clock, "process": partial(clock, now=time.process_time), "events": events, "graph": graph}

"""How many threads and how many steps: measured in the first seconds on work that is thrown away.

Wall time decides here and only here. The answers are written down before step 1, and everything after is a function of
the step alone, which is what makes resuming exact on a machine whose speed changes.
"""

import time
from dataclasses import dataclass, replace

import torch

from fastlm.backends.dispatch import record_choices
from fastlm.objectives import Objective
from fastlm.trainer.data.tokens import Tokens
from fastlm.trainer.distributed.ranks import ALONE, Ranks
from fastlm.trainer.options.training import DTYPES, Training
from fastlm.trainer.pull import Pull, starts_of
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import processes

PROBE = 0.6  # seconds of updates for each thread count
MARGIN = 0.97  # of the budget goes to what was measured; the rest to checkpoints and printing
SAMPLES = 4  # on the way, at each quarter
SAMPLE = 96  # tokens of one, where there is time
MEASURING = 0.25  # of the budget at most goes to trying thread counts, but for one update's time
LOOKING = 0.3  # of the budget at most goes to evaluations and samples


@dataclass(frozen=True)
class Looks:
    """How a model in training is looked at. evaluations: how often, besides the quarters and step 0; windows: of
    held-out text at each; last: at the last; sample: tokens of a sample.
    """

    evaluations: int
    windows: int
    last: int
    sample: int

    @classmethod
    def all_of(cls, config: Training, held_out: Objective) -> "Looks":
        """What was asked for, where time is no matter."""
        return cls(config.evaluations, min(held_out.looked_at, held_out.windows), held_out.windows, SAMPLE)

    @property
    def times(self) -> int:
        """Evaluations after step 0, in a long run."""
        return sum(due(step, 1000, self.evaluations) or due(step, 1000, SAMPLES) for step in range(1, 1001))

    @property
    def seen(self) -> int:
        """Windows in all."""
        return self.times * self.windows + self.last  # step 0 is one more look, and the last one is not like the others

    def seconds(self, window: float, token: float) -> float:
        """window, token: of one window, of one token of a sample."""
        return self.seen * window + SAMPLES * self.sample * token


@dataclass(frozen=True)
class Budget:
    """threads: CPU threads to use. steps: updates to train for. looks: evaluations and samples. fits: whether the steps
    fit in the minutes; one is done in any case. speeds: threads → tokens per second, where measured. backends: op → who
    computed it in an update.
    """

    threads: int
    steps: int
    looks: Looks
    fits: bool
    speeds: dict[int, float]
    backends: dict[str, str]


def measure(config: Training, tokens: Tokens, ranks: Ranks = ALONE) -> Budget:
    """Try the thread counts (one, and all of torch's, while there is time), then fix the steps that fit in the minutes;
    nothing is timed if the configuration leaves nothing to decide. Of several processes each takes the threads that it
    was started with, and the first one's budget is to be all's.
    """
    begun = time.perf_counter()
    trainer = Trainer(config.at_its_largest(), tokens, steps=1000, ranks=ranks)
    if config.pull:
        trainer.pull = Pull(config.pull, trainer.model, starts_of(trainer.model, ()))
    candidates = _thread_counts(config, trainer.device)
    torch.set_num_threads(candidates[0])
    with record_choices() as backends:
        first = _timed(trainer, 0.0)
    looks = Looks.all_of(config, trainer.held_out)
    if len(candidates) == 1 and config.steps:
        return Budget(candidates[0], config.steps, looks, True, {}, backends)
    until = begun + MEASURING * 60 * config.minutes if config.steps is None else float("inf")
    late = ranks.any(time.perf_counter() + first > until)
    seconds = {candidates[0]: first if late else _timed(trainer, PROBE)}
    for threads in candidates[1:]:
        best = min(seconds.values())
        if time.perf_counter() + best <= until:
            seconds[threads] = _seconds_per_update(trainer, threads, best, until)
    threads = min(seconds, key=seconds.get)
    torch.set_num_threads(threads)
    speeds = {n: trainer.tokens_per_update / s for n, s in seconds.items()}
    steps = config.steps
    if steps is None:
        largest, looks = _share(trainer, seconds[threads], begun)
        steps = config.updates_in(largest, trainer.train.context)
    return Budget(threads, max(1, steps), looks, steps >= 1, speeds, backends)


def dtype_cost(config: Training) -> float:
    """How many times fp32's time a matrix product takes in the configured dtype here; 1 on a GPU, which has the
    instructions. A CPU without them is several times slower, and says so nowhere.
    """
    if config.torch_device().type != "cpu" or config.dtype == "fp32":
        return 1.0
    return _product_seconds(getattr(torch, DTYPES[config.dtype])) / _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of four."""
    matrix, seconds = torch.ones(512, 512, dtype=dtype), []
    for _ in range(4):
        begun = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _thread_counts(config: Training, device: torch.device) -> list[int]:
    everything = torch.get_num_threads()  # physical cores, or what OMP_NUM_THREADS says
    if config.threads:
        return [config.threads]
    if processes() > 1:
        return [everything]
    return sorted({1, everything}) if device.type == "cpu" else [everything]


def _seconds_per_update(trainer: Trainer, threads: int, best: float, until: float) -> float:
    """The mean over PROBE seconds, after an update that warms up; that one's time if it is hopeless against the best so
    far, as several threads are on a machine that others keep busy, or if no time is left for another.
    """
    torch.set_num_threads(threads)
    first = _timed(trainer, 0.0)
    return first if first > 4 * best or time.perf_counter() + first > until else _timed(trainer, PROBE)


def _timed(trainer: Trainer, least: float) -> float:
    """Seconds per update, over at least one update and `least` seconds."""
    begun, updates = time.perf_counter(), 0
    while not updates or trainer.ranks.any(time.perf_counter() - begun < least):
        trainer.update()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        updates += 1
    return (time.perf_counter() - begun) / updates


def _share(trainer: Trainer, seconds_per_update: float, begun: float) -> tuple[int, Looks]:
    """Updates as large as the last one that fit in the minutes beside what measuring took and the looks at the model;
    below 1 if none does.
    """
    asked = Looks.all_of(trainer.config, trainer.held_out)
    at = time.perf_counter()
    windows = min(asked.windows, trainer.config.batch)
    trainer.evaluate(windows)
    window = (time.perf_counter() - at) / windows
    at = time.perf_counter()
    trainer.sample(4)
    token = (time.perf_counter() - at) / 4
    left = MARGIN * 60 * trainer.config.minutes - (time.perf_counter() - begun)
    looks = affordable(asked, window, token, LOOKING * left)
    return int((left - looks.seconds(window, token)) / seconds_per_update), looks


def affordable(asked: Looks, window: float, token: float, seconds: float) -> Looks:
    """The looks that were asked for, or what of them the seconds allow: shorter samples, evaluations at the quarters
    alone, not of all windows at the end, and then of fewer each time, in this order.

    window, token: seconds that a window of an evaluation takes, and a token of a sample.
    """
    allowed = int(seconds / 2 / SAMPLES / max(token, 1e-9))  # samples get half at most
    looks = replace(asked, sample=max(1, min(asked.sample, allowed)))
    room = int((seconds - SAMPLES * looks.sample * token) / max(window, 1e-9))  # windows in all
    if looks.seen <= room:
        return looks
    looks = replace(looks, evaluations=0)
    on_the_way = looks.seen - looks.last
    if on_the_way + looks.windows <= room:
        return replace(looks, last=min(asked.last, room - on_the_way))
    each = max(1, room // (looks.times + 1))
    return replace(looks, windows=min(asked.windows, each), last=min(asked.last, each))


def due(step: int, steps: int, times: int) -> bool:
    """Whether `step` is one of the `times` steps, spread evenly up to the last, at which something happens."""
    return step * times // steps > (step - 1) * times // steps

"""How many threads and how many steps: measured in the first seconds on work that is thrown away.

Wall time decides here and only here. The answers are written down before step 1, and everything after is a function of
the step alone, which is what makes resuming exact on a machine whose speed changes."""

import time
from dataclasses import dataclass

import torch

from fastlm.backends.dispatch import record_choices
from fastlm.trainer.config import DTYPES, Config
from fastlm.trainer.data.tokens import Tokens
from fastlm.trainer.step import GLANCE, SAMPLE, Trainer

PROBE = 0.6  # seconds of updates for each thread count
MARGIN = 0.97  # of the budget goes to what was measured; the rest to checkpoints and printing
SAMPLES = 4  # on the way, at each quarter


@dataclass(frozen=True)
class Budget:
    """threads: CPU threads to use. steps: updates to train for. fits: whether they fit in the minutes; one is done in
    any case. speeds: threads → tokens per second, where measured. backends: op → who computed it in an update."""

    threads: int
    steps: int
    fits: bool
    speeds: dict[int, float]
    backends: dict[str, str]


def measure(config: Config, tokens: Tokens) -> Budget:
    """Try the thread counts (one, and all of torch's), then fix the steps that fit in the minutes; nothing is timed if
    the configuration leaves nothing to decide."""
    begun = time.perf_counter()
    trainer = Trainer(config, tokens, steps=1000)
    candidates = _thread_counts(config, trainer.device)
    torch.set_num_threads(candidates[0])
    with record_choices() as backends:
        trainer.update()
    if len(candidates) == 1 and config.steps:
        return Budget(candidates[0], config.steps, True, {}, backends)
    seconds: dict[int, float] = {}
    for threads in candidates:
        seconds[threads] = _seconds_per_update(trainer, threads, min(seconds.values(), default=float("inf")))
    threads = min(seconds, key=seconds.get)
    torch.set_num_threads(threads)
    speeds = {n: trainer.tokens_per_update / s for n, s in seconds.items()}
    steps = config.steps or _steps(trainer, seconds[threads], begun)
    return Budget(threads, max(1, steps), steps >= 1, speeds, backends)


def dtype_cost(config: Config) -> float:
    """How many times fp32's time a matrix product takes in the configured dtype here; 1 on a GPU, which has the
    instructions. A CPU without them is several times slower, and says so nowhere."""
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


def _thread_counts(config: Config, device: torch.device) -> list[int]:
    everything = torch.get_num_threads()  # physical cores, or what OMP_NUM_THREADS says
    if config.threads:
        return [config.threads]
    return sorted({1, everything}) if device.type == "cpu" else [everything]


def _seconds_per_update(trainer: Trainer, threads: int, best: float) -> float:
    """The mean over PROBE seconds, after an update that warms up; that one's time if it is hopeless against the best so
    far, as several threads are on a machine that others keep busy."""
    torch.set_num_threads(threads)
    first = _timed(trainer, 0.0)
    return first if first > 4 * best else _timed(trainer, PROBE)


def _timed(trainer: Trainer, least: float) -> float:
    """Seconds per update, over at least one update and `least` seconds."""
    begun, updates = time.perf_counter(), 0
    while not updates or time.perf_counter() - begun < least:
        trainer.update()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        updates += 1
    return (time.perf_counter() - begun) / updates


def _steps(trainer: Trainer, seconds_per_update: float, begun: float) -> int:
    """Updates that fit in the minutes beside the evaluations, the samples and what measuring took; below 1 if none
    does."""
    config = trainer.config
    at = time.perf_counter()
    trainer.evaluate()
    glance = time.perf_counter() - at
    at = time.perf_counter()
    trainer.sample(16)
    sample = (time.perf_counter() - at) * SAMPLE / 16
    whole = glance * max(1.0, trainer.held_out.windows / GLANCE)
    spent = time.perf_counter() - begun
    free = MARGIN * 60 * config.minutes - spent - whole - (config.evaluations + 1) * glance - SAMPLES * sample
    return int(free / seconds_per_update)

"""One block of the GPU run, in a process of its own: python benchmarks/gpu/blocks.py BLOCK OUT SECONDS [--smoke]

Rows are appended to OUT/results.jsonl as they are measured, so that a block cut short loses one row. Blocks begin with
what matters most and stop when their seconds are spent.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
sys.path.append(str(HERE.parents[2]))  # a checkout built in place, unless fastlm is installed
import adamw  # noqa: E402
import attention  # noqa: E402
import machine  # noqa: E402
import optim  # noqa: E402
from shapes import PARAMETERS, SMOKE_PARAMETERS, Attention, gpu_attention  # noqa: E402

from fastlm import use_backend  # noqa: E402
from fastlm.ops.attention import attention as attention_op  # noqa: E402


class Run:
    """What every block is given: the device, the limits of each comparison, and whether there is time for one more."""

    def __init__(self, out: Path, seconds: float, smoke: bool):
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.smoke, self._out, self._end = smoke, out / "results.jsonl", time.monotonic() + seconds
        self.limits = {"rounds": 2, "budget": 1.0, "batch": 0.0} if smoke else {"rounds": 30, "budget": 4.0}
        self.clocks = ("graph", "events") if self.device.type == "cuda" else ("clock",)
        self.failures = 0

    def while_time_lasts(self, cases: list) -> Iterator:
        for i, case in enumerate(cases):
            if time.monotonic() > self._end:
                print(f"out of time: {len(cases) - i} of {len(cases)} cases were not measured, from {case}")
                return
            yield case

    @contextmanager
    def attempt(self, case: object) -> Iterator[None]:
        """What fails inside is told and counted, and the block goes on: device time is short."""
        try:
            yield
        except Exception:
            self.failures += 1
            print(f"FAILED: {case}\n{traceback.format_exc()}")

    def keep(self, row: dict) -> None:
        with self._out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def copy_rate(self) -> float:
        return machine.copy_rate(self.device, 2**20 if self.smoke else 2**30)

    def release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def describe(run: Run) -> None:
    """Names and versions; the copy rate and the rate of a large bf16 product, which bound everything else."""
    facts = machine.describe(run.device)
    rates = {"copy": run.copy_rate(), "matmul": machine.matmul_rate(run.device, 64 if run.smoke else 8192)}
    run.keep({"kind": "machine", **facts, **rates})
    for name, value in facts.items():
        print(f"{name:8} {value}")
    print(
        f"copy {rates['copy'] / 1e12:.2f} TB/s, bf16 product {rates['matmul'] / 1e12:.0f} TFLOP/s; "
        f"clocks after: {machine.clocks()}"
    )


def time_adamw(run: Run) -> None:
    time_steps(run, adamw, adamw.BYTES)


def time_optim(run: Run) -> None:
    time_steps(run, optim, optim.STEPS)


def time_steps(run: Run, room: ModuleType, kinds: Iterable[str]) -> None:
    """room: adamw or optim, which check and measure alike."""
    copy = run.copy_rate()
    parameters = SMOKE_PARAMETERS if run.smoke else PARAMETERS
    for name, kind in run.while_time_lasts([(name, kind) for name in parameters for kind in kinds]):
        with run.attempt((name, kind)):
            error = room.check(parameters[name], kind, run.device)
            for clock in run.clocks:
                run.release()
                run.keep(room.measure(name, parameters[name], kind, clock, run.device, copy, **run.limits))
                print(f"{room.__name__} {kind} {name} {clock}: checked ({error:.0e}) and timed")


def time_attention(run: Run) -> None:
    """By value: the lengths people train at first, biased before plain."""
    if run.smoke:
        problems = [Attention(scheme, 2, 2, 32, 16, torch.float32) for scheme in ("t5", "alibi", "none")]
    else:
        lengths, schemes = (2048, 512, 8192, 1024, 4096, 16384), ("t5", "alibi", "none")
        problems = [gpu_attention(scheme, L, D) for L in lengths for D in (64, 128) for scheme in schemes]
    # Plain attention is torch's by default; what is measured here is ours.
    ours = (
        {"attention": "triton", "attention_backward": "triton"}
        if run.device.type == "cuda" and "triton" in attention_op.names()
        else {}
    )
    with use_backend(**ours):
        for problem in run.while_time_lasts(problems):
            run.release()
            with run.attempt(problem):
                time_one_attention(run, problem)


def time_one_attention(run: Run, problem: Attention) -> None:
    x = attention.make_inputs(problem, run.device)
    errors = attention.check(x, gradients=True)
    field = attention.contestants(x)
    for direction in ("forward", "backward"):
        run.keep(attention.measure(x, field, direction, run.clocks[0], **run.limits))
    print(
        f"attention {problem}: checked ({max(errors.values()):.0e}) and timed; "
        f"beyond the inputs {attention.peak_bytes(x) / 2**20:.1f} MiB"
    )


BLOCKS = {"machine": describe, "adamw": time_adamw, "optim": time_optim, "attention": time_attention}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("block", choices=BLOCKS)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    run = Run(arguments.out, arguments.seconds, arguments.smoke)
    if run.device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs capture a side stream, and backward runs where forward did
    BLOCKS[arguments.block](run)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())

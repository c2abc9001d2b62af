"""One block of the GPU run, in a process of its own: python benchmarks/gpu/blocks.py BLOCK OUT SECONDS [--smoke]

Rows are appended to OUT/results.jsonl as they are measured, so that a block cut short loses one row. Blocks begin with
what matters most and stop when their seconds are spent.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
sys.path.append(str(HERE.parents[2]))  # a checkout built in place, unless fastlm is installed
import adamw  # noqa: E402
import attention  # noqa: E402
import cross_entropy  # noqa: E402
import machine  # noqa: E402
import optim  # noqa: E402
from plan import (  # noqa: E402
    LIMITS,
    SMOKE_LOSSES,
    SPARE_LENGTHS,
    TILES,
    TUNED_LENGTH,
    attention_problems,
    loss_problems,
    smoke_problems,
    tile_problems,
)
from shapes import PARAMETERS, SMOKE_PARAMETERS, Attention  # noqa: E402
from timing import compare  # noqa: E402

from fastlm import use_backend  # noqa: E402
from fastlm.kernels import tiles  # noqa: E402


class Run:
    """What every block is given: the device, the limits of each comparison, and whether there is time for one more."""

    def __init__(self, out: Path, seconds: float, smoke: bool):
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.smoke, self._out, self._end = smoke, out / "results.jsonl", time.monotonic() + seconds
        self.limits = {"rounds": 2, "budget": 1.0, "batch": 0.0} if smoke else LIMITS
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


def time_optimizers(run: Run) -> None:
    """Every kind of step at each list of parameters, the largest second: it shows what memory allows."""
    copy = run.copy_rate()
    parameters = SMOKE_PARAMETERS if run.smoke else PARAMETERS
    # of other libraries' AdamW none is on a borrowed machine but torch's, which is adamw's opponent
    steps = [(room, kind) for room, kinds in ((adamw, adamw.BYTES), (optim, optim.STEPS)) for kind in kinds]
    steps = [(room, kind) for room, kind in steps if kind != "libraries"]
    for name, (room, kind) in run.while_time_lasts([(name, step) for name in parameters for step in steps]):
        with run.attempt((name, kind)):
            error = room.check(parameters[name], kind, run.device)
            for clock in run.clocks:
                run.release()
                run.keep(room.measure(name, parameters[name], kind, clock, run.device, copy, **run.limits))
                print(f"{room.__name__} {kind} {name} {clock}: checked ({error:.0e}) and timed")


def time_attention(run: Run) -> None:
    problems = smoke_problems() if run.smoke else [*attention_problems(), *attention_problems(SPARE_LENGTHS)]
    with use_backend(**ours(run)):
        for problem in run.while_time_lasts(problems):
            run.release()
            with run.attempt(problem):
                time_one_attention(run, problem)


def ours(run: Run) -> dict[str, str]:
    """Plain attention is torch's by default; what is measured here is ours."""
    return {"attention": "triton", "attention_backward": "triton"} if run.device.type == "cuda" else {}


def time_one_attention(run: Run, problem: Attention) -> None:
    x = attention.make_inputs(problem, run.device)
    errors = attention.check(x, gradients=True)
    field = attention.contestants(x, tuned=problem.L == TUNED_LENGTH and problem.scheme != "none")
    for direction in ("forward", "backward"):
        run.keep(attention.measure(x, field, direction, run.clocks[0], **run.limits))
    print(
        f"attention {problem}: checked ({max(errors.values()):.0e}) and timed; "
        f"beyond the inputs {attention.peak_bytes(x) / 2**20:.1f} MiB"
    )


def time_tiles(run: Run) -> None:
    """Each kernel by the tiles of kernels/tiles.py and by others, within the whole forward or backward pass."""
    if run.smoke or torch.cuda.get_device_capability() != (9, 0):
        print("the tiles to try are for sm_90")
        return
    with use_backend(**ours(run)):
        for kernel, problem in run.while_time_lasts(tile_problems()):
            run.release()
            with run.attempt((kernel, problem)):
                time_one_kernel(run, kernel, problem)


def time_one_kernel(run: Run, kernel: str, problem: Attention) -> None:
    x = attention.make_inputs(problem, run.device)
    direction = "forward" if kernel == "forward" else "backward"
    call, row = attention.ours(x).call(direction, x.grad), tiles.TABLE[kernel][90]
    shipped = row[problem.D]

    def by(candidate: tiles.Tiles) -> None:
        row[problem.D] = candidate
        call()
        row[problem.D] = shipped

    candidates = {str(tuple(candidate)): candidate for candidate in TILES[kernel][problem.D]}
    calls = {"fastlm": shipped, **candidates}
    calls = {name: lambda chosen=chosen: [lambda: by(chosen)] for name, chosen in calls.items()}
    facts = {"D": problem.D, "direction": direction, "flops": problem.flops(direction)}
    facts |= {"scheme": problem.scheme, "B": problem.B, "H": problem.H, "L": problem.L, "dtype": "bfloat16"}
    run.keep(compare(calls, run.clocks[0], **run.limits).row(kind=f"tiles of {kernel}", shipped=str(shipped), **facts))
    print(f"tiles of {kernel}, D {problem.D}: timed {', '.join(candidates)} beside {tuple(shipped)}")


def time_losses(run: Run) -> None:
    """By graphs, which multiply rows without a target too, and by events, which wait for how many have one."""
    rate = machine.matmul_rate(run.device, 64 if run.smoke else 8192)
    for problem in run.while_time_lasts(SMOKE_LOSSES if run.smoke else loss_problems()):
        run.release()
        with run.attempt(problem):
            x = cross_entropy.Inputs(problem, run.device)
            error = cross_entropy.check(x)
            for clock in run.clocks:
                run.keep(cross_entropy.measure(x, clock, rate, **run.limits))
            print(f"loss {problem}: checked ({error:.0e}) and timed")


BLOCKS = {
    "machine": describe, "optimizers": time_optimizers, "attention": time_attention, "tiles": time_tiles,
    "loss": time_losses,
}  # fmt: skip


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

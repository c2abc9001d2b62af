"""Compile what a block will time, while nothing is timed: python benchmarks/gpu/ahead.py attention|tiles I/N

Triton keeps what it compiled on disk, so our kernels are compiled by their launchers on tensors without storage
(benchmarks/resources.py). FlexAttention's compiler wants the real device: it is called once, forward and backward, as
it will be timed, except as max-autotune would have it, which must not measure beside other processes.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
sys.path.append(str(HERE.parents[2]))  # a checkout built in place, unless fastlm is installed
import attention  # noqa: E402
import resources  # noqa: E402
from plan import TILES, attention_problems, tile_problems  # noqa: E402
from shapes import Attention  # noqa: E402

from fastlm.kernels import tiles  # noqa: E402


def items(what: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what to do) of everything that is compiled ahead. Lengths and batches share our kernels."""
    if what == "tiles":
        for kernel, problem in tile_problems():
            for candidate in TILES[kernel][problem.D]:
                run = lambda kernel=kernel, problem=problem, candidate=candidate: with_tiles(kernel, problem, candidate)
                yield f"{kernel} D {problem.D} {tuple(candidate)}", run
        return
    seen = set()
    for problem in attention_problems():
        if (problem.scheme, problem.D) not in seen:
            seen.add((problem.scheme, problem.D))
            yield f"ours, {problem}", lambda problem=problem: ours(problem)
    for problem in attention_problems():
        yield f"FlexAttention, {problem}", lambda problem=problem: flex(problem)


def with_tiles(kernel: str, problem: Attention, candidate: tiles.Tiles) -> None:
    tiles.TABLE[kernel][90][problem.D] = candidate
    ours(problem)


def ours(problem: Attention) -> None:
    """Forward and backward of every kernel that the problem uses."""
    resources.B, resources.L, resources.H, resources.HK = problem.B, problem.L, problem.H, problem.H
    major, minor = torch.cuda.get_device_capability()
    resources.driver.set_active(resources.PaperGPU(10 * major + minor))
    learned = set() if problem.scheme == "alibi" else None
    resources.attention_case(problem.dtype, problem.D, None if problem.scheme == "none" else "table", learned)()
    resources.driver.reset_active()


def flex(problem: Attention) -> None:
    x = attention.make_inputs(problem, torch.device("cuda", 0))
    attention.flex(x).call("both", x.grad)()


def main() -> None:
    what, part = sys.argv[1:]
    i, n = map(int, part.split("/"))
    for name, run in list(items(what))[i::n]:
        run()
        print(f"compiled {name}")


if __name__ == "__main__":
    main()

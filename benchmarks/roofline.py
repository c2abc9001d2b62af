"""What each kernel moves and computes, and the time no GPU can beat for it: bytes, operations, launches, instructions.

    python benchmarks/roofline.py [--out FILE]

Counts follow from the tiles of kernels/tiles.py and the walks of kernels/, not from a measurement. DRAM: each input
read once, each result written once. L2: what programs load tile by tile. Instructions: of the compiled kernel for
sm_90, both loops (benchmarks/resources.py). A GPU's time is the largest of DRAM, L2 and products, at the rates of GPUS.
FlexAttention's rows take its own tiles by the same method (torch/_inductor/template_heuristics/triton.py, sm_90).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout built in place, unless fastlm is installed
import resources
from optim import BYTES
from shapes import PARAMETERS, Attention, elements, gpu_attention

from fastlm.kernels.tiles import cdiv, tiles

# name → (DRAM bytes, L2 bytes, bf16 operations) a second. By data sheets; L2 at 24 bytes a clock and multiprocessor.
GPUS = {
    "A100": (2.0e12, 108 * 1.41e9 * 24, 312e12),
    "H100": (3.35e12, 132 * 1.76e9 * 24, 989e12),
    "H200": (4.8e12, 132 * 1.98e9 * 24, 989e12),
    "B200": (8.0e12, 148 * 1.85e9 * 24, 2250e12),
}
FLEX = {"forward": {64: (128, 128), 128: (128, 64)}, "dq": {64: (128, 64), 128: (128, 64)},
        "dkdv": {64: (64, 128), 128: (64, 128)}}  # fmt: skip
TENSORS_A_LAUNCH = 726  # of 4 lists (csrc/cuda/batch.h)


@dataclass(frozen=True)
class Count:
    dram: float
    l2: float
    flops: float
    launches: int

    def times(self) -> list[float]:
        """Microseconds on each of GPUS."""
        work = self.dram, self.l2, self.flops
        return [1e6 * max(amount / rate for amount, rate in zip(work, rates, strict=True)) for rates in GPUS.values()]


def walk(kernel: str, x: Attention, M: int, N: int) -> Count:
    """A causal walk in bf16 with tiles of M queries and N keys; `table` walks the diagonals of squares."""
    heads, row = x.B * x.H, 2 * x.D  # bytes of a row of channels
    seen = sum(cdiv(min((i + 1) * M, x.L), N) for i in range(cdiv(x.L, M)))  # tiles of one head
    tensor = heads * x.L * row
    # products of a tile; what a program loads once for a row of its own, then for each row of the other side
    products, own, other, own_rows, other_rows, passes = {
        "forward": (2, 1, 2, M, N, 4),
        "dq": (3, 3, 2, M, N, 6),
        "dkdv": (4, 2, 2, N, M, 6),
        "table": (2, 0, 4, 0, N, 4),
    }[kernel]
    owned = cdiv(x.L, own_rows) * own_rows * own if own else 0
    return Count(
        passes * tensor, heads * row * (owned + seen * other * other_rows), heads * seen * products * 2 * M * N * x.D, 1
    )


def compiled(problem: Attention) -> dict[str, int]:
    """Kernel → instructions, for sm_90, with T5's table."""
    gpu = resources.PaperGPU(90)
    resources.driver.set_active(gpu)
    resources.attention_case(problem.dtype, problem.D, "table")()
    measured = [resources.measure("", 90, *each) for each in gpu.compiled]
    return {each.kernel: each.instructions for each in measured}


def line(name: str, count: Count, instructions: int | str = "") -> str:
    mega = lambda amount: f"{amount / 1e6:.0f}"
    times = " | ".join(f"{t:.0f}" for t in count.times())
    return (
        f"| {name} | {mega(count.dram)} | {mega(count.l2) if count.l2 else ''} | {count.flops / 1e9:.1f} "
        f"| {count.launches} | {instructions} | {times} |"
    )


def attention_lines(D: int) -> list[str]:
    x = gpu_attention("t5", 2048, D)
    instructions, lines = compiled(x), []
    for kernel, name in (("forward", "forward"), ("dq", "dq"), ("dkdv", "dkdv"), ("table", "distances")):
        chosen = tiles(kernel, D, x.dtype, 90)
        size = chosen.BLOCK_M, chosen.BLOCK_M if kernel == "table" else chosen.BLOCK_N
        lines.append(line(f"{name}, D {D}, {size[0]}×{size[1]}", walk(kernel, x, *size), instructions[name]))
        if kernel in FLEX and FLEX[kernel][D] != size:
            size = FLEX[kernel][D]
            lines.append(line(f"FlexAttention's {name}, D {D}, {size[0]}×{size[1]}", walk(kernel, x, *size)))
    return lines


def optimizer_lines() -> list[str]:
    lines = []
    for shapes in ("gpt2-124M", "gpt-1.3B"):
        n, tensors = elements(PARAMETERS[shapes]), len(PARAMETERS[shapes])
        steps = {"adamw": 28} | {kind: size for kind, size in BYTES.items() if kind not in ("libraries", "adafactor")}
        for kind, size in steps.items():
            launches = 1 + cdiv(tensors, TENSORS_A_LAUNCH) if kind in ("adamw", "bf16", "sgd") else ""
            lines.append(line(f"{kind}, {shapes}", Count(size * n, 0, 0, launches)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes, operations, launches, instructions and the time they take.")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heading = [
        "16,384 tokens, L 2048, causal, T5's table, bf16; times in µs.\n",
        f"| | DRAM, MB | L2, MB | GFLOP | launches | instructions | {' | '.join(GPUS)} |",
        f"|{'---|' * (6 + len(GPUS))}",
    ]
    table = "\n".join([*heading, *attention_lines(64), *attention_lines(128), *optimizer_lines()]) + "\n"
    print(table)
    if arguments.out:
        arguments.out.write_text(f"{__doc__.splitlines()[0]}\n\n{table}")


if __name__ == "__main__":
    main()

"""How large a tile each kernel takes: the one table to edit when tuning. `benchmarks/resources.py` prints what every
entry costs.

Chosen by what compilers make of it: registers first (the forward spills nothing in 16 bits up to head size 128; the
backward kernels little), then as many warps on a multiprocessor as that allows, then the larger tile. Row 80 keeps to
99 KB of shared memory, so that it serves sm_86, sm_89 and sm_120 too.
"""

from typing import NamedTuple

import torch

LARGEST = 128  # rows


class Tiles(NamedTuple):
    """Queries and keys of a tile; warps of a program; depth of its pipeline of loads; a cap on a thread's registers.

    The cap makes room for a second program beside it. 255, all there are, keeps the compiler from spilling for the sake
    of a third.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict:
        """What the compiler is told, without the tile itself."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


# kernel → GPU (fp32 computes without tensor cores, the same everywhere) → head size up to → tiles
TABLE = {
    "forward": {
        "fp32": {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
        90: {64: Tiles(128, 64, 8, 3, maxnreg=128), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 2)},
        100: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 2)},
    },
    "forward_bias": {  # a bias is loaded by the tile, and takes registers for it
        "fp32": {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
        90: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
        100: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
    },
    "split": {  # few queries, and a share of the keys; BLOCK_M: the most rows, of queries by heads
        "fp32": {64: Tiles(64, 32, 8, 2), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {64: Tiles(64, 64, 4, 3), 128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 4, 2)},
        90: {64: Tiles(64, 64, 4, 4), 128: Tiles(64, 64, 4, 3), 256: Tiles(16, 32, 4, 3)},
        100: {64: Tiles(64, 64, 4, 4), 128: Tiles(16, 64, 4, 3), 256: Tiles(16, 32, 4, 3)},
    },
    "dq": {
        "fp32": {64: Tiles(64, 32, 8, 2), 128: Tiles(16, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
        80: {64: Tiles(128, 32, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
        90: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
        100: {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 1)},
    },
    "dkdv": {
        "fp32": {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {64: Tiles(32, 128, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
        90: {64: Tiles(64, 128, 8, 2), 128: Tiles(64, 128, 8, 2), 256: Tiles(32, 64, 8, 1)},
        100: {64: Tiles(64, 64, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(64, 64, 8, 1)},
    },
    "bias": {
        "fp32": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {64: Tiles(64, 64, 8, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(32, 32, 8, 1)},
        90: {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(64, 64, 8, 1)},
        100: {64: Tiles(64, 64, 8, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(64, 64, 8, 1)},
    },
    "vectors": {  # the first three where rows by distance are met; square, for those lie on a slant
        "fp32": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {128: Tiles(32, 32, 4, 1, maxnreg=255), 256: Tiles(16, 16, 4, 1)},
        90: {128: Tiles(32, 32, 4, 1, maxnreg=255), 256: Tiles(16, 16, 4, 1)},
        100: {128: Tiles(32, 32, 4, 1, maxnreg=255), 256: Tiles(16, 16, 4, 1)},
    },
    "vector_sums": {  # their gradients; square
        "fp32": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
        90: {128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
        100: {128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
    },
    "table": {  # BLOCK_M × BLOCK_M, BLOCK_N keys at a time: those on one block diagonal hold the same distances
        "fp32": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 32, 16, 1), 256: Tiles(16, 16, 8, 1)},
        80: {64: Tiles(64, 32, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
        90: {64: Tiles(128, 64, 8, 1), 128: Tiles(64, 64, 8, 2), 256: Tiles(64, 64, 8, 1)},
        100: {64: Tiles(128, 64, 8, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(64, 64, 8, 1)},
    },
}


def tiles(kernel: str, D: int, dtype: torch.dtype, architecture: int) -> Tiles:
    """The entry of TABLE for head size D ≤ 256 on a GPU of that compute capability."""
    row = "fp32" if dtype == torch.float32 else {9: 90, 10: 100}.get(architecture // 10, 80)
    return next(entry for largest, entry in TABLE[kernel][row].items() if largest >= D)


def block_d(D: int) -> int:
    """The power of two that holds D channels; 16 is the least that a tensor core takes."""
    return max(16, power_of_two(D))


# Triton's own are functions of kernels too, and take 10 µs on the host.


def power_of_two(n: int) -> int:
    """The least that is no smaller than n ≥ 1."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)

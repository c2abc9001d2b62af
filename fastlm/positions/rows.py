"""Rows of a learned table by distance, with a gradient that does not queue on GPUs.

The gradient of table[index] adds the rows of equal indices there one after the other, in a fixed order. Far distances
share an index, about L of them in T5, Shaw and DeBERTa, so one of these sums would take as long as the rest of a layer.
"""

import torch
from torch import Tensor

WALK = 64  # rows that are added one after the other, about


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index]: table [rows, ...], index [n] int64 → [n, ...]; on GPUs its gradient has copies_of(...) sums a row,
    which are added up at the end. Bits repeat.
    """
    return _rows_of(table, index, copies_of(len(table), len(index)) if index.is_cuda else 1)


def buckets_of(index: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which rows of a table distances have, each once where neighbours share it.

    Args:
        index: [n] int64, the row of each distance.

    Returns:
        (the rows [buckets] int64, and the bucket of each distance [n]). On GPUs, where their number would be waited
        for, and for compilers, which may not know it, each distance has its own: (index, None).
    """
    if index.device.type != "cpu" or type(index) is not Tensor or torch.compiler.is_compiling():
        return index, None
    rows, buckets = torch.unique_consecutive(index, return_inverse=True)
    return rows, buckets if len(rows) < len(index) else None


def copies_of(rows: int, n: int) -> int:
    """How many sums the gradient of each row gets: for WALK additions in each at most where that many fit into the
    memory of the n rows.
    """
    return max(1, min(n // WALK, n // rows))


def _rows_of(table: Tensor, index: Tensor, copies: int) -> Tensor:
    """The rows taken from so many copies in turn, which are all the table itself."""
    if copies == 1:
        return table[index]
    turn = torch.arange(len(index), device=index.device) % copies
    return table[:, None].expand(-1, copies, *table.shape[1:])[index, turn]

"""Matrices of queries and keys by the distance between them, and distances by bucket, as plain PyTorch.

Distances are counted from the farthest key before the last query on: n = Lq + Lk - 1 of them, j - i + Lq - 1 for query
i and key j. buckets [n] int says which vectors neighbouring distances share; None for one each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_shift(x: Tensor, Lk: int) -> Tensor:
    """[..., Lq, n] → [..., Lq, Lk]: row i's entries for its keys."""
    Lq = x.shape[-2]
    columns = torch.arange(Lk, device=x.device) - torch.arange(Lq, device=x.device)[:, None] + Lq - 1
    return x.gather(-1, columns.expand(*x.shape[:-1], Lk))


def by_distance(x: Tensor) -> Tensor:
    """[..., Lq, Lk] → [..., Lq, n]: the transpose of `relative_shift`, zero at distances a row does not have.

    Padding every row by Lq and re-reading the buffer with rows one shorter shifts row i right by i: no scatter.
    """
    Lq, Lk = x.shape[-2:]
    width = Lq + Lk - 1
    padded = F.pad(x.flip(-2), (0, Lq)).flatten(-2)
    return padded[..., : Lq * width].unflatten(-1, (Lq, width)).flip(-2)


def of_each(vectors: Tensor, buckets: Tensor | None) -> Tensor:
    """[H, buckets, D] → [H, n, D]: each bucket's vector, for each of its distances."""
    return vectors if buckets is None else vectors[:, buckets.long()]


def per_bucket(x: Tensor, vectors: Tensor, buckets: Tensor | None) -> Tensor:
    """The way back for gradients, [H, n, D] → like vectors: the sum over each bucket's distances."""
    if buckets is None:
        return x
    return x.new_zeros(vectors.shape).index_add(1, buckets.long(), x)

"""What the ranks of a process group make together, in the order of ranks, so that bits are the same at every run and on
every rank. Groups go by their names, "" for none, as operators can take them.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def size(group: str) -> int:
    return _of(group).size() if group else 1


def gathered(x: Tensor, group: str) -> Tensor:
    """[ranks, …], every rank's x."""
    every = x.new_empty(size(group), *x.shape)
    dist.all_gather(list(every.unbind()), x.contiguous(), group=_of(group))
    return every


def summed(x: Tensor, group: str) -> Tensor:
    """Σ of every rank's x [n, …]. Each rank adds up a share of the rows and hands it to the others: as many bytes as a
    ring's, whose order of sums is its own.
    """
    share = -(-len(x) // size(group))
    mine = x.new_zeros(size(group) * share, *x.shape[1:])
    mine[: len(x)] = x
    of_all = torch.empty_like(mine)
    dist.all_to_all_single(of_all, mine, group=_of(group))
    return gathered(of_all.unflatten(0, (-1, share)).sum(0), group).flatten(0, 1)[: len(x)]


def added_up(x: Tensor, group: str) -> Tensor:
    """Σ of every rank's x, in whatever order is fastest: where the others' are 0."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_of(group))
    return total


def _of(name: str) -> "dist.ProcessGroup":
    return dist.distributed_c10d._resolve_process_group(name)

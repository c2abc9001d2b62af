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
    group = _of(group)
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def summed(x: Tensor, group: str) -> Tensor:
    """Σ of every rank's x [n, …]. Each rank adds up a share of the rows and hands it to the others: as many bytes as a
    ring's, whose order of sums is its own.
    """
    group = _of(group)
    share = -(-len(x) // group.size())
    mine = x.new_zeros(group.size() * share, *x.shape[1:])
    mine[: len(x)] = x
    of_all, whole = torch.empty_like(mine), torch.empty_like(mine)
    dist.all_to_all_single(of_all, mine, group=group)
    dist.all_gather_into_tensor(whole, of_all.unflatten(0, (group.size(), share)).sum(0), group=group)
    return whole[: len(x)]


def added_up(x: Tensor, group: str) -> Tensor:
    """Σ of every rank's x, in whatever order is fastest: where the others' are 0."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_of(group))
    return total


def _of(name: str) -> "dist.ProcessGroup":
    return dist.distributed_c10d._resolve_process_group(name)

"""Sums over whole tensors, whose elements may lie in shards on several ranks.

An op whose update needs such sums (LAMB's norms, Adafactor's means) has the update rule of one tensor as a generator:
it yields what to sum, as (x, dims) pairs, and is sent the sums over all ranks, with those dims kept as 1. `run_rules`
runs rules: the op's definition one tensor at a time, which lies here in full, and a sharded optimizer many side by
side, so that every round of sums is one all-reduce for each process group and not one for each tensor. So there is one
formula, and nothing of it knows about ranks.
"""

from collections.abc import Generator

import torch
from torch import Tensor

Summands = list[tuple[Tensor, tuple[int, ...]]]
UpdateRule = Generator[Summands, list[Tensor], None]
# (dimension of a tensor, process group of the ranks among which it is divided), of each such division
Shards = tuple[tuple[int, object], ...]


def run_rules(rules: list[UpdateRule], shards: list[Shards]) -> None:
    """Run rules to their end, side by side. shards: how each rule's tensors are divided, () for one that lies here in
    full.
    """
    waiting: list[tuple[int, list[Tensor] | None]] = [(i, None) for i in range(len(rules))]
    while waiting:
        sums, groups, counts = [], [], []
        for i, sent in waiting:
            try:
                summands = rules[i].send(sent)
            except StopIteration:
                continue
            counts.append((i, len(summands)))
            for x, dims in summands:
                sums.append(x.sum(dims, keepdim=True))
                groups.append(tuple(group for dim, group in shards[i] if dim - x.ndim in dims))
        totals = iter(all_reduce_sums(sums, groups))
        waiting = [(i, [next(totals) for _ in range(count)]) for i, count in counts]


def all_reduce_sums(sums: list[Tensor], groups: list[tuple]) -> list[Tensor]:
    """Each sum's total over its process groups: one all-reduce for each group, in fp64, and nothing for the host to
    wait for.
    """
    totals = list(sums)
    for group in dict.fromkeys(group for each in groups for group in each):
        chosen = [i for i, each in enumerate(groups) if group in each]
        packed = torch.cat([totals[i].flatten().double() for i in chosen])
        torch.distributed.all_reduce(packed, group=group)
        for i, total in zip(chosen, packed.split([totals[i].numel() for i in chosen]), strict=True):
            totals[i] = total.view(totals[i].shape).to(totals[i].dtype)
    return totals


def all_dims(x: Tensor) -> tuple[int, ...]:
    """All dimensions of x, as rules name them: from the last, -1, to the first."""
    return tuple(range(-x.ndim, 0))

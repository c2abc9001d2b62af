"""What ranks hand one another while they compute: in step s = 0 … world - 1 each meets what belongs to the rank s
before it, round the circle of a process group.

Every rank takes the same steps in the same order. What belongs to a rank comes straight from there, and goes to those
alone that meet it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Tensors = tuple[Tensor, ...]


class OnTheWay(NamedTuple):
    """Tensors that are sent and received meanwhile. sent: they must live until then. received: None for none."""

    requests: list
    sent: Tensors
    received: Tensors | None

    def arrived(self) -> Tensors | None:
        """Wait, and return what is received."""
        for request in self.requests:
            request.wait()
        return self.received


class Exchange:
    """The steps of one call.

    Args:
        group: a process group; None for all processes.
        meets: [world][world], whether a rank meets what belongs to another; the same on every rank.
    """

    def __init__(self, group: "dist.ProcessGroup | None", meets: list[list[bool]]):
        self.group, self.meets = group, meets
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def turns(self, own: Tensors, lengths: list[int]) -> Iterator[tuple[int, Tensors | None]]:
        """Each rank whose turn it is, this one first, with what belongs to it, None where it is not met. What is next
        comes meanwhile, so there are two of others' at most.

        own: [B, heads, L, D] or [B, L] each. lengths: every rank's L.
        """
        own = tuple(x.contiguous() for x in own)
        coming = self._fetch(1, own, lengths)
        yield self.rank, own if self.meets[self.rank][self.rank] else None
        for step in range(1, self.world):
            arrived, coming = [coming.arrived()], self._fetch(step + 1, own, lengths)
            yield self.before(step), arrived.pop()  # nothing here keeps it

    def _fetch(self, step: int, own: Tensors, lengths: list[int]) -> OnTheWay:
        """Own tensors go to the rank that meets them in this step, and those that this one meets come."""
        if step >= self.world:
            return OnTheWay([], (), None)
        source, target = self.before(step), self.after(step)
        comes = tuple(_like(x, lengths[source]) for x in own) if self.meets[self.rank][source] else None
        return self._swap(own if self.meets[target][self.rank] else None, target, comes, source)

    def give_back(self, step: int, made: Tensors | None, own: Tensors) -> OnTheWay:
        """What was made of the tensors whose turn it was goes to their rank; the same of own tensors comes from the
        rank whose turn they were, None where it did not meet them.
        """
        source, target = self.before(step), self.after(step)
        comes = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in own)
        return self._swap(made, source, comes if self.meets[target][self.rank] else None, target)

    def _swap(self, sent: Tensors | None, target: int, received: Tensors | None, source: int) -> OnTheWay:
        """sent goes to target, and received is filled by source; None for nothing."""
        ops = [dist.P2POp(dist.isend, x, group=self.group, group_peer=target) for x in sent or ()]
        ops += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=source) for x in received or ()]
        return OnTheWay(dist.batch_isend_irecv(ops) if ops else [], sent or (), received)

    def before(self, step: int) -> int:
        return (self.rank - step) % self.world

    def after(self, step: int) -> int:
        return (self.rank + step) % self.world


def _like(x: Tensor, length: int) -> Tensor:
    """An empty tensor like x, of another length."""
    return x.new_empty(*x.shape[:-2], length, x.shape[-1]) if x.ndim == 4 else x.new_empty(x.shape[0], length)

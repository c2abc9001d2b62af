"""The processes of a run, which torchrun starts, and what they tell one another.

All of them do the same in the same order: every method of `Ranks` but `part` is a collective, and waits for the others.
What a clock or a signal decides is decided once for all. The first rank alone writes and speaks; when a run fails, the
first rank that notices says why.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from fastlm.trainer.signals import Stops
from fastlm.trainer.words import Failure, processes

if TYPE_CHECKING:  # torch takes seconds, for which a mistyped flag need not wait
    import torch

PATIENCE = timedelta(minutes=30)  # one rank may evaluate, write or compile while the others wait
# how gloo and NCCL say that a rank is no longer there
GONE = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "NCCL", "Connection refused")
ENDED = "fastlm/ended"  # where the first rank to end counts itself


class Ranks:
    """Processes of one run.

    Attributes:
        rank: this process's number. Default 0.
        world: how many there are. Default 1, which tells nobody anything.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    @property
    def speaks(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's part of so many rows: stretches of equal length, or of lengths that differ by one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.world == 1 else self.total({"": int(flag)})[""] > 0

    def check(self, stops: Stops) -> None:
        """Raises Stopped if a stop came to any rank."""
        if self.any(stops.first is not None):
            stops.note("another rank was stopped")
            stops.check()

    def total(self, counts: dict[str, int]) -> dict[str, int]:
        """Counts of all ranks, key by key."""
        if self.world == 1:
            return counts
        import torch

        values = torch.tensor(list(counts.values()), dtype=torch.int64)
        torch.distributed.all_reduce(values)
        return dict(zip(counts, values.tolist(), strict=True))

    def sums(self, values: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Tensors of one dtype summed over all ranks, key by key; the host does not wait for a device."""
        if self.world == 1:
            return values
        import torch

        flat = torch.cat([value.reshape(-1) for value in values.values()])
        torch.distributed.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}

    def told(self, text: str) -> str:
        """The first rank's text."""
        if self.world == 1:
            return text
        import torch

        words = torch.tensor(list(text.encode()) if self.speaks else [], dtype=torch.uint8)
        size = self.total({"": len(words)})[""]
        words = words if self.speaks else torch.empty(size, dtype=torch.uint8)
        torch.distributed.broadcast(words, 0)
        return bytes(words.tolist()).decode()

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """The first rank does what is in the block before the others do, who find what it left."""
        if not self.speaks:
            self.any(False)
        yield
        if self.speaks:
            self.any(False)


ALONE = Ranks()
# groups, to the process's end: what lets go of one waits for its threads, and DDP's reducer, if it were the last, would
# hold the lock of Python, which they may wait for
_held: list = []


@contextmanager
def joined(device_type: str) -> Iterator[Ranks]:
    """Inside the `with` block, the processes that torchrun started are one group; without it there is one.

    Raises Failure when another rank is gone.
    """
    if processes() == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    with noticing("start again"):
        dist.init_process_group(backend, timeout=PATIENCE)
        _held.append(dist.group.WORLD)
        yield Ranks(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it would wait for the others


@contextmanager
def noticing(cure: str) -> Iterator[None]:
    """Raises Failure, with the cure, when another rank turns out to be gone."""
    try:
        yield
    except Failure:
        raise
    except RuntimeError as error:
        if processes() == 1 or not any(words in str(error) for words in GONE):
            raise
        raise Failure(f"another process of this run is gone; {cure}") from error


def may_tell() -> bool:
    """Whether this process is the one to say why the run ends: the first that asks, or the first rank while they have
    not joined.
    """
    if processes() == 1:
        return True
    import torch.distributed as dist

    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().add(ENDED, 1) == 1

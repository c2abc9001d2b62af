"""Ranks that tests run functions on: processes on this machine that talk through gloo, started once for all tests that
need some.
"""

import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from time import monotonic

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300.0  # seconds for one function; a rank that waits for a collective no other calls waits no longer
# seconds, and times, to become a group: gloo, which connects each two ranks, was seen to lose a connection
TOGETHER_IN, TRIES = 150.0, 3
PATIENCE_AFTER = 5.0  # seconds for the others after one has failed, which may wait for it


MOST = 4


class Ranks:
    """Processes, the first `world` of which are one process group. run(f, *args) calls f(rank, world, *args) on each of
    these; f is a module's function.
    """

    def __init__(self):
        self.world, self._group = MOST, ""
        self._folder = tempfile.TemporaryDirectory()
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(MOST)]
        self._pipes = [ours for ours, _ in pipes]
        serve = lambda rank, pipe: context.Process(target=_serve, args=(rank, pipe), daemon=True)
        self._processes = [serve(rank, theirs) for rank, (_, theirs) in enumerate(pipes)]
        for process in self._processes:
            process.start()

    def of(self, world: int) -> "Ranks":
        """The same processes, so many of them in a new group."""
        self.world, self._group = world, os.path.join(self._folder.name, os.urandom(4).hex())
        return self

    def run(self, function, *args) -> None:
        """Assertions that fail on a rank fail here, with that rank's traceback."""
        for attempt in range(TRIES):
            failed = self._ask(TOGETHER_IN, None)
            if not failed:
                failed = self._ask(PATIENCE, function, *args)
                break
            if attempt < TRIES - 1:
                self._start_again()
        if failed:
            self._start_again()
            raise AssertionError("\n".join(failed))

    def _ask(self, patience: float, function, *args) -> list[str]:
        """Have each rank call a function, or for None become one of the group; what went wrong, on whatever rank."""
        pipes = self._pipes[: self.world]
        for pipe in pipes:
            pipe.send((self.world, self._group, function, args))
        waiting, failed, until = {pipe: rank for rank, pipe in enumerate(pipes)}, {}, monotonic() + patience
        while waiting and (ready := wait(list(waiting), max(0, until - monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                if answer := pipe.recv():
                    failed[rank], until = answer, min(until, monotonic() + PATIENCE_AFTER)
        failed |= dict.fromkeys(waiting.values(), "no answer")
        return [f"rank {rank} of {self.world}:\n{failed[rank]}" for rank in sorted(failed)]

    def _start_again(self) -> None:
        """For ranks may be anywhere after one of them failed."""
        self.stop()
        self._start()
        self.of(self.world)

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _serve(rank: int, pipe) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    here = None
    while True:
        world, group, function, args = pipe.recv()
        try:
            if function is not None:
                function(rank, world, *args)
                dist.barrier()
            elif group != here:
                _join(rank, world, group)
                here = group
            pipe.send("")
        except Exception:
            pipe.send(traceback.format_exc())


def _join(rank: int, world: int, group: str) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=world, timeout=patience)


@pytest.fixture(scope="session")
def every_rank():
    ranks = Ranks()
    yield ranks
    ranks.stop()


@pytest.fixture
def ranks(every_rank, request):
    """As many ranks as the test asks for."""
    return every_rank.of(request.param)

"""Ranks that tests run functions on: processes on this machine that talk through gloo and live as long as the tests
that need them.
"""

import os
import tempfile
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 100.0  # seconds for one function; a rank that waits for a collective no other calls waits no longer


class Ranks:
    """`world` processes in one process group. run(f, *args) calls f(rank, world, *args) on each; f is a module's
    function.
    """

    def __init__(self, world: int):
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        self._start()

    def _start(self) -> None:
        context, store = mp.get_context("spawn"), os.path.join(self._folder.name, f"store{os.urandom(4).hex()}")
        pipes = [context.Pipe() for _ in range(self.world)]
        self._pipes = [ours for ours, _ in pipes]
        serve = lambda rank, pipe: context.Process(target=_serve, args=(rank, self.world, store, pipe), daemon=True)
        self._processes = [serve(rank, theirs) for rank, (_, theirs) in enumerate(pipes)]
        for process in self._processes:
            process.start()

    def run(self, function, *args) -> None:
        """Assertions that fail on a rank fail here, with that rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [pipe.recv() if pipe.poll(PATIENCE) else f"no answer in {PATIENCE:g} s" for pipe in self._pipes]
        failed = [f"rank {rank} of {self.world}:\n{answer}" for rank, answer in enumerate(answers) if answer]
        if failed:  # the others may be anywhere
            self.stop()
            self._start()
            raise AssertionError("\n".join(failed))

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _serve(rank: int, world: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        function, args = pipe.recv()
        try:
            function(rank, world, *args)
            dist.barrier()
            pipe.send("")
        except Exception:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def ranks(request):
    """Ranks for the tests of a module that ask for as many."""
    ranks = Ranks(request.param)
    yield ranks
    ranks.stop()

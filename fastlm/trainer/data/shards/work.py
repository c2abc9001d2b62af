"""Work on parts, once each, in several processes, that can be killed at any moment and gone on with.

    OUT/.work/asked.json     what was asked for: another request is not gone on with
    OUT/.work/<job>.json     what one job found, written when its other files are in their places: it is done

Every file is written beside these and renamed when it is whole. What a job makes depends on the job alone, so that the
output is the same bit for bit, however often the work was interrupted and in however many processes it is done.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

from fastlm.trainer.data.shards.folders import ASKED, FOLDER
from fastlm.trainer.disk import LOCK, TEMPORARY, replacing
from fastlm.trainer.words import Failure, Refusal


class Work:
    """The work on a folder's files.

    Args:
        out: the folder.
        done: the name of the file there that is written last.
    """

    def __init__(self, out: Path, done: str):
        self.out, self.folder, self.last = out, out / FOLDER, out / done

    def begin(self, asked: dict) -> bool:
        """Make ready for a request, or for going on with it; whether there is anything left to do.

        Raises Refusal for a folder that holds something else.
        """
        asked, begun = json.loads(json.dumps(asked)), self.folder / ASKED  # as it is read back
        if self.last.exists():
            _check_same(self.out, json.loads(self.last.read_text(encoding="utf-8")).get("asked", {}), asked)
            self.end()
            return False
        if begun.exists():
            _check_same(self.out, json.loads(begun.read_text(encoding="utf-8")), asked)
            return True
        if any(path.name not in (FOLDER, LOCK) for path in self.out.iterdir()):
            raise Refusal(f"--out {self.out} is not an empty folder; give another one")
        self.folder.mkdir(exist_ok=True)
        self.write(begun, json.dumps(asked, indent=1))
        return True

    def file(self, path: Path) -> AbstractContextManager[BinaryIO]:
        """A file to write, which is in its place when the `with` block ends well."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return replacing(path, self.folder / f"{TEMPORARY}{os.getpid()}-{path.parent.name}-{path.name}")

    def write(self, path: Path, text: str) -> None:
        """A file of this text."""
        with self.file(path) as file:
            file.write(text.encode())

    def found(self, job: str) -> dict | None:
        """What a job found; None for one that is not done."""
        path = self.folder / f"{job}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def do(self, jobs: Sequence[tuple[str, tuple]], call: Callable[..., dict], processes: int) -> Iterator[str]:
        """Do what is not done of the jobs, (name, arguments) each, by call(work, *arguments) → what it found; yields
        the name of each when it is done.

        Raises Failure if a process dies.
        """
        left = [job for job in jobs if not (self.folder / f"{job[0]}.json").exists()]
        if processes == 1 or len(left) < 2:
            for name, arguments in left:
                _done(self, name, call, arguments)
                yield name
            return
        # forked, a process would inherit locks that threads of this one hold
        pool = ProcessPoolExecutor(min(processes, len(left)), get_context("spawn"), _worker)
        try:
            yield from self._shared(pool, left, call, 2 * processes)
        except BrokenProcessPool as error:
            raise Failure(
                f"a process that worked on {self.out} was killed, as for want of memory; the same command goes on, and "
                "with a smaller --processes takes less"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _shared(self, pool: ProcessPoolExecutor, left: list, call: Callable[..., dict], ahead: int) -> Iterator[str]:
        """A few jobs at a time, so that an error is heard early."""
        running: dict[Future, str] = {}
        jobs = iter(left)
        while True:
            while len(running) < ahead and (job := next(jobs, None)) is not None:
                running[pool.submit(_done, self, job[0], call, job[1])] = job[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)

    def end(self) -> None:
        """All is done, and `last` says so: take away what is no output."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _check_same(out: Path, before: dict, asked: dict) -> None:
    other = [name for name in asked if before.get(name) != asked[name]]
    if other:
        raise Refusal(f"{out} was begun with other {', '.join(other)}; ask for the same again, or give another --out")


def _done(work: Work, name: str, call: Callable[..., dict], arguments: tuple) -> None:
    found = call(work, *arguments)
    work.write(work.folder / f"{name}.json", json.dumps(found))


def _worker() -> None:
    """A process of the pool leaves Ctrl-C to the one that started it, without which it finds no more work; its
    tokenizer takes one thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

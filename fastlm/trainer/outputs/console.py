"""What a run says while it runs: labelled lines, and one line of progress.

On a terminal one line is updated in place; elsewhere a plain line appears every few seconds. No colours, no escape
codes.
"""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from fastlm.trainer import words

PERIOD = {True: 0.2, False: 5.0}  # seconds between progress lines, on a terminal and elsewhere


class Console:
    """Labelled lines, and one progress line that stays below them on a terminal.

    lost: called once with the reason, when the output cannot be written any more; lines go to stderr from then on.
    speaks: whether lines are shown at all, which of several processes those of one are.
    """

    def __init__(self, lost: Callable[[str], None] = lambda why: None, speaks: bool = True):
        self.speaks = speaks
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
        self.lost = lost
        self._file = sys.stdout
        self._shown = ""
        self._next = 0.0

    def say(self, label: str, *parts: str) -> None:
        """A labelled line above the progress line."""
        if not self.speaks:
            return
        with self._noticing():
            if self._shown:
                print("\r" + " " * len(self._shown) + "\r", end="", file=self._file)
                self._shown = ""
            words.say(label, *parts, file=self._file)

    def say_all(self, lines: Iterable[tuple[str, ...]]) -> None:
        for line in lines:
            self.say(*line)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Inside the `with` block, Python's warnings are labelled lines too."""
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: self.say("warning", " ".join(str(message).split()))
            yield

    def due(self) -> bool:
        """Whether the progress line is old."""
        return self.speaks and time.monotonic() >= self._next

    def progress(self, parts: Sequence[str]) -> None:
        """Show how far the run is: on a terminal, as many of the parts as fit into its width, the first ones."""
        if not self.speaks:
            return
        self._next = time.monotonic() + PERIOD[self.live]
        with self._noticing():
            if not self.live:
                print("  ".join(parts), flush=True, file=self._file)
                return
            wide = shutil.get_terminal_size().columns
            lines = ["  ".join(parts[:n]) for n in range(len(parts), 0, -1)]
            text = next((line for line in lines if len(line) < wide), lines[-1][: wide - 1])
            print("\r" + text.ljust(len(self._shown)), end="", flush=True, file=self._file)
            self._shown = text

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Notice that the reader is gone, be it a pipe's other end, a terminal, or room on a disk."""
        try:
            yield
        except OSError as error:
            if self._file is sys.stderr:  # nobody is left to tell
                return
            discard_output()
            self.live, self._file, self._shown = False, sys.stderr, ""
            self.lost(f"the output cannot be written ({error.strerror})")


def discard_output() -> None:
    """Have stdout lead nowhere: Python writes what it still holds when the process ends."""
    with suppress(OSError, ValueError):  # a stand-in for stdout may have no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

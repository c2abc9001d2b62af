"""What a run says while it runs: labelled lines, and one line of progress.

On a terminal one line is updated in place; elsewhere a plain line appears every few seconds. No colours, no escape
codes."""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from fastlm.trainer import words

PERIOD = {True: 0.2, False: 5.0}  # seconds between progress lines, on a terminal and elsewhere


class Console:
    """Labelled lines, and one progress line that stays below them on a terminal."""

    def __init__(self):
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
        self._shown = ""
        self._next = 0.0

    def say(self, label: str, *parts: str) -> None:
        """A labelled line above the progress line."""
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="")
            self._shown = ""
        words.say(label, *parts)

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
        return time.monotonic() >= self._next

    def progress(self, parts: Sequence[str]) -> None:
        """Show how far the run is: on a terminal, as many of the parts as fit into its width, the first ones."""
        self._next = time.monotonic() + PERIOD[self.live]
        if not self.live:
            print("  ".join(parts), flush=True)
            return
        wide = shutil.get_terminal_size().columns
        lines = ["  ".join(parts[:n]) for n in range(len(parts), 0, -1)]
        text = next((line for line in lines if len(line) < wide), lines[-1][: wide - 1])
        print("\r" + text.ljust(len(self._shown)), end="", flush=True)
        self._shown = text

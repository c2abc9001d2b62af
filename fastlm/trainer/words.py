"""How fastlm speaks: refusals in one line, labelled lines, and numbers as people read them. Needs nothing but
Python."""

import difflib
from collections.abc import Iterable
from typing import TextIO


class Refusal(ValueError):
    """What was asked cannot be done. The message is one line: the value, and the cure."""


class Failure(RuntimeError):
    """What was begun could not be finished. The message is one line: what happened, and what to try."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def say(label: str, *parts: str, file: TextIO | None = None) -> None:
    """Print `label  part · part`, to stdout unless told otherwise."""
    print(f"{label:<8} " + " · ".join(parts), flush=True, file=file)


def clock(seconds: float) -> str:
    """75 → 1:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def count(n: float) -> str:
    """1234567 → 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def megabytes(n: float) -> str:
    return f"{n / 1e6:.3g} MB"


def bar(share: float, width: int = 20) -> str:
    done = int(share * width)
    return "━" * done + "─" * (width - done)

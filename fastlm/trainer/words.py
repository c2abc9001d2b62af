"""How fastlm speaks: refusals in one line, labelled lines, and numbers as people read them. Needs nothing but
Python.
"""

import errno
import math
import os
import shlex
from pathlib import Path
from typing import TextIO

from fastlm.checks import did_you_mean as did_you_mean
from fastlm.checks import nearest

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says of a disk, a quota and a file


class Refusal(ValueError):
    """What was asked cannot be done. The message is one line: the value, and the cure."""


class Failure(RuntimeError):
    """What was begun could not be finished. The message is one line: what happened, and what to try."""


def absent(path: Path, cure: str) -> str:
    """`X does not exist`, with what beside it has nearly its name, or else the cure."""
    beside = path.absolute().parent
    near = nearest(path.name, [other.name for other in beside.iterdir()] if beside.is_dir() else [])
    return f"{path} does not exist; {f'did you mean {path.with_name(near)}?' if near else cure}"


def disk_words(error: OSError, folder: Path, held: str, then: str) -> str:
    """Of a folder that cannot be written to: why, what there is all the same, and the cure."""
    cure = "free some space" if error.errno in FULL else "put that right"
    return f"{folder} cannot be written to ({error.strerror}); {held}: {cure}, then {then}"


def processes() -> int:
    """How many processes torchrun started as one run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def command(*words: object) -> str:
    """`fastlm` with these words, quoted so that a shell takes them as they are; what trains, in as many processes as
    this run.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if words[0] in ("pretrain", "finetune", "resume") else 1
    launched = ("torchrun", "--nproc-per-node", here, "-m") if here > 1 else ()
    return shlex.join(map(str, (*launched, "fastlm", *words)))


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.rstrip("_").replace("_", "-")


def utf8(text: str) -> str:
    """The text with ? for lone surrogates, which JSON and the names of files may hold and UTF-8 may not."""
    return text.encode(errors="replace").decode()


def several(n: int, thing: str) -> str:
    """1 file, 1,234 files."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


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


def size(n: float) -> str:
    """1234567 → 1.23 MB."""
    power = min(5, max(1, int(math.log10(max(n, 1))) // 3))
    return f"{n / 1000**power:.3g} {' kMGTP'[power]}B"

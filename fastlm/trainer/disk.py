"""Files on a disk that are whole or not there, whatever ends the process that writes them, and folders in which one
process works.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastlm.trainer.words import Refusal

TEMPORARY = ".tmp-"
LOCK = ".lock"  # who has it locked works in the folder; its being there says nothing


def write_file(path: Path, text: str) -> None:
    """Replace a file by new text, or leave it as it was: never anything in between."""
    with replacing(path, path.with_name(f"{TEMPORARY}{path.name}")) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path, made: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its place when the `with` block ends well. made: where it stands until then, on the
    same disk.
    """
    try:
        with made.open("wb") as file:
            yield file
        flush(made)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder (which Windows does by itself)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the system lets them in when this one ends, however it ends.

    Raises Refusal if another one is there. Windows has no such lock, and there nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        file = (folder / LOCK).open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refusal(f"another process is at work in {folder}; wait until it ends, or give another folder") from None
    except OSError as error:
        raise Refusal(f"{folder} cannot be locked for writing ({error.strerror}); use a folder that can") from error
    with file:
        yield

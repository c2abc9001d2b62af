"""The text a run learns from: which files, what was skipped and why, what is held out, and a fingerprint of it all.

Without --data it is the source code of the running interpreter's standard library, which every machine has: 9 MB of
Python and English. Nothing is downloaded. A file is one document; each line of a .jsonl file is one. Files are read one
at a time and again for each pass, so a corpus may be larger than memory.

Held out are whole documents, chosen by a hash of their bytes: a copy of a document lands on the same side. Where that
misses the wanted share, as with a few large files, the last part of every document is held out instead."""

import gzip
import hashlib
import importlib.util
import json
import os
import platform
import sysconfig
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastlm.trainer.words import Refusal

HELD_OUT = 0.05
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# of the default corpus
NOT_PROSE = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}
# 10 MB of torch's sources, where Python's are missing
TORCH_PARTS = ("nn", "optim", "utils", "distributions", "distributed")


@dataclass(frozen=True)
class Source:
    """One file that was read. name: its path below the folder that was given. chosen: how many of its bytes the hash
    puts among the held-out share. sha: SHA-256 of all of them."""

    path: Path
    name: str
    bytes: int
    chosen: int
    sha: str


@dataclass(frozen=True)
class Corpus:
    """Files that can be trained on. skipped: reason → count. repeated: share of lines that repeat an earlier line."""

    name: str
    sources: tuple[Source, ...]
    skipped: dict[str, int]
    repeated: float

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.sources)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every file's name and bytes."""
        listing = "".join(f"{s.name}\0{s.sha}\n" for s in self.sources)
        return hashlib.sha256(listing.encode()).hexdigest()

    @cached_property
    def whole(self) -> bool:
        """Whether whole documents are held out: the hash's choice holds between a third and three times the wanted
        share."""
        return HELD_OUT / 3 <= sum(s.chosen for s in self.sources) / self.bytes <= HELD_OUT * 3

    @property
    def split(self) -> str:
        return f"held out: {'whole documents' if self.whole else 'the end of each document'}"

    def documents(self, held_out: bool) -> Iterator[str]:
        """The train side's documents, or the held-out side's, in the order of the files' names.

        Raises Refusal if a file is no longer what it was when it was found.
        """
        for source in self.sources:
            for document in _unchanged(source):
                if not self.whole:
                    cut = _tail(document)
                    yield document[cut:] if held_out else document[:cut]
                elif chosen(document) == held_out:
                    yield document


def find(paths: tuple[Path, ...]) -> Corpus:
    """The corpus in the given files and folders, or the default one. Raises Refusal, in words."""
    return _survey(*(_given(paths) if paths else _default()))


def read_documents(path: Path) -> list[str]:
    """The documents of a file: its whole text, or one a line for .jsonl. Raises Refusal with the reason to skip it."""
    if path.exists() and not path.is_file():  # a pipe or a device is read once, or waits forever
        raise Refusal("not a regular file")
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refusal("not UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(f"unreadable ({type(error).__name__})") from None
    documents = _json_lines(text) if path.name.removesuffix(".gz").endswith(".jsonl") else [text]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise Refusal("empty")
    return documents


def chosen(document: str) -> bool:
    """Whether the hash of its bytes puts a document among the held-out share."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") < HELD_OUT * 2**32


# ---------------------------------------------------------------------------------------------------------------------
# Where the files are


def _given(paths: tuple[Path, ...]) -> tuple[str, list[tuple[Path, str]]]:
    files = []
    for path in paths:
        if not path.exists():
            raise Refusal(f"--data {path} does not exist")
        files += _below(path) if path.is_dir() else [(path, path.name)]
    if not files:
        raise Refusal(f"--data {' '.join(map(str, paths))} holds no {', '.join(SUFFIXES)} file (each may be .gz)")
    return " ".join(map(str, paths)), files


def _default() -> tuple[str, list[tuple[Path, str]]]:
    library = f"Python {platform.python_version()} standard library"
    files = _below(Path(sysconfig.get_paths()["stdlib"]), (".py",), NOT_PROSE)
    if files:
        return library, files
    torch = Path(importlib.util.find_spec("torch").origin).parent
    files = [
        (path, f"{part}/{name}") for part in TORCH_PARTS for path, name in _below(torch / part, (".py",), NOT_PROSE)
    ]
    if files:
        return f"torch's own sources (the {library} is not there as .py files)", files
    raise Refusal(f"the {library} is not there as .py files, nor are torch's sources; give text with --data PATH")


def _below(folder: Path, suffixes: tuple[str, ...] = SUFFIXES, without: Collection[str] = ()) -> list[tuple[Path, str]]:
    """(path, name below folder) of text files, sorted by name; hidden folders and those named in `without` are passed
    over."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in without and not f.startswith((".", "__pycache__"))]
        found += [Path(here, n) for n in names if n.removesuffix(".gz").endswith(suffixes)]
    return sorted(((path, path.relative_to(folder).as_posix()) for path in found), key=lambda f: f[1])


# ---------------------------------------------------------------------------------------------------------------------
# One pass over them


def _survey(name: str, files: list[tuple[Path, str]]) -> Corpus:
    """Read every file once: keep what can be read, count what cannot, hash, and look for repeated lines."""
    sources, skipped, lines = [], Counter(), _Lines()
    for path, short in files:
        try:
            documents = read_documents(path)
        except Refusal as reason:
            skipped[str(reason)] += 1
            continue
        size, held = (sum(len(d.encode()) for d in some) for some in (documents, filter(chosen, documents)))
        sources.append(Source(path, short, size, held, _sha(documents)))
        for document in documents:
            lines.add(document)
    if not sources:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise Refusal(f"no text in {name}: of {len(files)} files {reasons}")
    return Corpus(name, tuple(sources), dict(skipped), lines.repeated)


def _unchanged(source: Source) -> list[str]:
    try:
        documents = read_documents(source.path)
    except Refusal:
        documents = []
    if _sha(documents) != source.sha:
        raise Refusal(f"{source.path} changed while the text was being read; run again when nobody writes to it")
    return documents


def _sha(documents: list[str]) -> str:
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


class _Lines:
    """How often a line of more than 20 characters repeats an earlier one; the first four million are looked at."""

    def __init__(self):
        self.seen: set[int] = set()
        self.count = 0

    def add(self, document: str) -> None:
        if self.count < 4_000_000:
            lines = [hash(line) for line in map(str.strip, document.splitlines()) if len(line) > 20]
            self.count += len(lines)
            self.seen.update(lines)

    @property
    def repeated(self) -> float:
        return 1 - len(self.seen) / self.count if self.count else 0.0


def _bytes(path: Path) -> bytes:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.read()
    return path.read_bytes()


def _json_lines(text: str) -> list[str]:
    """The "text" of each line of a .jsonl file, or the line's string itself."""
    documents = []
    # splitlines would also cut at U+2028, which JSON allows in strings
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            document = _json_text(line)
            if document is None:
                raise Refusal(f'.jsonl without a "text" string in line {number}')
            documents.append(document)
    return documents


def _json_text(line: str) -> str | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    text = row.get("text") if isinstance(row, dict) else row
    # JSON allows lone surrogates, UTF-8 does not
    return text.encode(errors="replace").decode() if isinstance(text, str) else None


def _tail(document: str) -> int:
    """Where the held-out end of a document begins: at a line's start if one is near, else anywhere."""
    cut = int(len(document) * (1 - HELD_OUT))
    line = document.rfind("\n", cut // 2, cut) + 1
    return line or cut

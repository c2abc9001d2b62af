"""The text a run learns from: which files, what was skipped and why, what is held out, and a fingerprint of it all.

Without --data it is the source code of the running interpreter's standard library, which every machine has: 9 MB of
Python and English. Nothing is downloaded. Files are read one at a time and again for each pass, so a corpus may be
larger than memory.

Held out are whole documents, chosen by a hash of their bytes: a copy of a document lands on the same side. Where that
misses the wanted share, as with a few large files, the last part of every document is held out instead. A validation
text takes the place of both.
"""

import hashlib
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from fastlm.trainer.data.files import Skipped, below, read_documents
from fastlm.trainer.words import Refusal, absent

HELD_OUT = 0.05
# of the default corpus
NOT_PROSE = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}
# 10 MB of torch's sources, where Python's are missing
TORCH_PARTS = ("nn", "optim", "utils", "distributions", "distributed")


@dataclass(frozen=True)
class Source:
    """One file that was read. name: its path below the folder that was given. chosen: how many of its bytes the hash
    puts among the held-out share. sha: SHA-256 of all of them.
    """

    path: Path
    name: str
    bytes: int
    chosen: int
    sha: str


@dataclass(frozen=True)
class Corpus:
    """Files that can be trained on. text_key: the field of a row that holds its text. repeated: share of lines that
    repeat an earlier line. validation: the text that is held out, where that is another.
    """

    name: str
    sources: tuple[Source, ...]
    text_key: str
    skipped: Skipped
    repeated: float
    validation: "Corpus | None" = None

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.sources)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every file's name and bytes."""
        listing = "".join(f"{s.name}\0{s.sha}\n" for s in self.sources)
        if self.validation is not None:
            listing += f"held out\0{self.validation.fingerprint}\n"
        return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()  # names are bytes

    @cached_property
    def whole(self) -> bool:
        """Whether whole documents are held out: the hash's choice holds between a third and three times the wanted
        share.
        """
        return HELD_OUT / 3 <= sum(s.chosen for s in self.sources) / self.bytes <= HELD_OUT * 3

    @property
    def split(self) -> str:
        if self.validation is not None:
            return f"held out: {self.validation.name}"
        return f"held out: {'whole documents' if self.whole else 'the end of each document'}"

    def documents(self, held_out: bool) -> Iterator[str]:
        """The train side's documents, or the held-out side's, in the order of the files' names.

        Raises Refusal if a file is no longer what it was when it was found.
        """
        if self.validation is not None:
            yield from (self.validation if held_out else self).all_documents()
            return
        for source in self.sources:
            for document in self._unchanged(source):
                if not self.whole:
                    cut = tail(document)
                    yield document[cut:] if held_out else document[:cut]
                elif chosen(document) == held_out:
                    yield document

    def all_documents(self) -> Iterator[str]:
        """Every document, in the order of the files' names; errors as in `documents`."""
        for source in self.sources:
            yield from self._unchanged(source)

    def _unchanged(self, source: Source) -> list[str]:
        try:
            documents = read_documents(source.path, self.text_key, Skipped().add)
        except Refusal:
            documents = []
        if _sha(documents) != source.sha:
            raise Refusal(f"{source.path} changed while the text was being read; run again when nobody writes to it")
        return documents


def find(paths: tuple[Path, ...], text_key: str = "text", validation: tuple[Path, ...] = ()) -> Corpus:
    """The corpus in the given files and folders, or the default one. Raises Refusal, in words.

    text_key: the field of a .jsonl's, .json's, .csv's or .tsv's row that holds its text. validation: files and folders
    of which all is held out, and then nothing of the others.
    """
    skipped = Skipped()
    name, files = _given(paths, skipped) if paths else default_files()
    held_out = None
    if validation:
        held_out = _survey(*_given(validation, skipped, "--validation"), text_key, skipped)
    return replace(_survey(name, files, text_key, skipped), validation=held_out)


def check_there(paths: tuple[Path, ...], flag: str = "--data") -> None:
    """Raises Refusal for a path of the flag that is not there."""
    for path in paths:
        if not path.exists():
            raise Refusal(f"{flag} {absent(path, 'give a file or a folder')}")


def chosen(document: str) -> bool:
    """Whether the hash of its bytes puts a document among the held-out share."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") < HELD_OUT * 2**32


# ---------------------------------------------------------------------------------------------------------------------
# Where the files are


def _given(paths: tuple[Path, ...], skipped: Skipped, flag: str = "--data") -> tuple[str, list[tuple[Path, str]]]:
    check_there(paths, flag)
    files = []
    for path in paths:
        files += below(path, skipped.add) if path.is_dir() else [(path, path.name)]
    return " ".join(map(str, paths)), files


def default_files() -> tuple[str, list[tuple[Path, str]]]:
    """What is read where nothing is given: what it is called, and its files. Raises Refusal if they are not there."""
    library = f"Python {platform.python_version()} standard library"
    files = _sources_below(Path(sysconfig.get_paths()["stdlib"]))
    if files:
        return library, files
    torch = Path(importlib.util.find_spec("torch").origin).parent
    files = [(path, f"{part}/{name}") for part in TORCH_PARTS for path, name in _sources_below(torch / part)]
    if files:
        return f"torch's own sources (the {library} is not there as .py files)", files
    raise Refusal(f"the {library} is not there as .py files, nor are torch's sources; give text with --data PATH")


def _sources_below(folder: Path) -> list[tuple[Path, str]]:
    return below(folder, Skipped().add, (".py",), NOT_PROSE)


# ---------------------------------------------------------------------------------------------------------------------
# One pass over them


def _survey(name: str, files: list[tuple[Path, str]], text_key: str, skipped: Skipped) -> Corpus:
    """Read every file once: keep what can be read, note what cannot, hash, and look for repeated lines."""
    sources, lines = [], _Lines()
    for path, short in files:
        try:
            documents = read_documents(
                path, text_key, lambda reason, line, file=short: skipped.add(reason, f"{file}:{line}")
            )
        except Refusal as reason:
            skipped.add(str(reason), short)
            continue
        size, held = (sum(len(d.encode()) for d in some) for some in (documents, filter(chosen, documents)))
        sources.append(Source(path, short, size, held, _sha(documents)))
        for document in documents:
            lines.add(document)
    if not sources:
        raise Refusal(f"no text in {name}: {'; '.join(skipped.lines()) or 'no file is there'}")
    return Corpus(name, tuple(sources), text_key, skipped, lines.repeated)


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


def tail(document: str) -> int:
    """Where the held-out end of a document begins: at a line's start if one is near, else anywhere."""
    cut = int(len(document) * (1 - HELD_OUT))
    line = document.rfind("\n", cut // 2, cut) + 1
    return line or cut

"""Which files hold text, and the documents in each. What is not taken is told with its place, never dropped in silence.

A file is one document. Of a .jsonl, .json, .csv or .tsv each row is one: its field `text_key`, or a string without a
field. The rows of a .json are its array's members, or its lines if it is a .jsonl in truth. Each may also be a .gz. A
file that was named itself is read whatever its suffix.
"""

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from fastlm.trainer.words import Refusal, utf8

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", *DELIMITERS)
SHOWN = 3  # places named for each reason

Tell = Callable[[str, str], None]  # takes a reason, and a place: `Skipped.add`


class Skipped:
    """What was not taken: how often for each reason, and where first."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= SHOWN:
            self.first.setdefault(reason, []).append(place)

    def lines(self) -> list[str]:
        """One for each reason: how often, why, where."""
        places = {
            reason: ", ".join(some) + ", …" * (self.counts[reason] > SHOWN) for reason, some in self.first.items()
        }
        return [f"{count:,} × {reason}: {places[reason]}" for reason, count in self.counts.items()]

    def to_json(self) -> dict:
        """The same as JSON has it: reason → how often, and the first places."""
        return {reason: [count, self.first[reason]] for reason, count in self.counts.items()}

    @classmethod
    def merged(cls, *several: dict) -> "Skipped":
        """What `to_json` was of, one after the other."""
        skipped = cls()
        for reason, (count, places) in chain.from_iterable(each.items() for each in several):
            skipped.counts[reason] += count
            first = skipped.first.setdefault(reason, [])
            first += places[: SHOWN - len(first)]
        return skipped


def below(
    folder: Path, tell: Tell, suffixes: tuple[str, ...] = SUFFIXES, without: Collection[str] = ()
) -> list[tuple[Path, str]]:
    """(path, name below folder) of files with these suffixes, sorted by name; `tell` is told what else there is.

    without: names of folders to pass over.
    """
    found = []

    def name(*parts: str) -> str:
        return Path(*parts).relative_to(folder).as_posix()

    for here, folders, files in os.walk(folder, onerror=lambda error: tell(_unreadable(error), name(error.filename))):
        folders[:] = sorted(inner for inner in folders if inner not in without and inner != "__pycache__")
        for inner in folders:
            if os.path.islink(os.path.join(here, inner)):  # which may lead in a circle
                tell("a link to a folder; give that folder itself to --data", name(here, inner))
            elif inner.startswith("."):
                tell("a hidden folder", name(here, inner))
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        for inner in sorted(files):
            if _suffix(inner) in suffixes:
                found.append((Path(here, inner), name(here, inner)))
            else:
                tell(f"not {', '.join(suffixes)}; a file named itself is read as plain text", name(here, inner))
    return sorted(found, key=lambda file: file[1])


def read_documents(path: Path, text_key: str, tell: Tell) -> list[str]:
    """The documents of a file that hold more than white space. Raises Refusal with the reason if there are none.

    tell: of each row without one it is told the reason, and the line.
    """
    with _read(path) as text:
        rows = _documents(text, path, text_key, tell) if has_rows(path) else [text]
        documents = [document for document in rows if document.strip()]
    if not documents:
        raise Refusal("no text in it")
    return documents


def has_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return _suffix(path.name) in (".jsonl", ".json", *DELIMITERS)


def read_rows(path: Path, tell: Tell) -> list[tuple[int, object]]:
    """(line, row) of a file that holds rows; of an array in a .json, (place, row). Raises Refusal with the reason if it
    cannot be read. tell: as in `read_documents`.
    """
    with _read(path) as text:
        return list(_rows(text, path, tell))


@contextmanager
def _read(path: Path) -> Iterator[str]:
    """The text of a file, and Refusal for what goes wrong with it."""
    if path.exists() and not path.is_file():  # a pipe or a device is read once, or waits forever
        raise Refusal("not a regular file")
    try:
        yield _decoded(_bytes(path))
    except UnicodeDecodeError:
        raise Refusal("not UTF-8; `iconv -t UTF-8` converts it") from None
    except csv.Error as error:
        raise Refusal(f"no table ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(_unreadable(error)) from None


def _suffix(name: str) -> str:
    """What says how a file is read: of TEXT.TXT.gz, .txt."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _unreadable(error: Exception) -> str:
    return f"unreadable ({getattr(error, 'strerror', None) or error})"


def _bytes(path: Path) -> bytes:
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:
            return file.read()
    return path.read_bytes()


def _decoded(data: bytes) -> str:
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what some programs on Windows write
    text = data.decode("utf-16" if marked else "utf-8-sig")
    if "\0" in text:
        raise Refusal("binary")
    return text


def _rows(text: str, path: Path, tell: Tell) -> Iterator[tuple[int, object]]:
    suffix = _suffix(path.name)
    if suffix in DELIMITERS:
        return table_rows(io.StringIO(text, newline=""), DELIMITERS[suffix], tell)
    return _json_lines(text, tell) if suffix == ".jsonl" else _json_rows(text, tell)


def _documents(text: str, path: Path, key: str, tell: Tell) -> Iterator[str]:
    """The text of each row that has one."""
    for line, row in _rows(text, path, tell):
        document = text_of(row, key, lambda reason, what, line=line: tell(reason, f"{line}{what}"))
        if document is not None:
            yield document


def text_of(row: object, key: str, tell: Tell) -> str | None:
    """A row's text, if it has one. tell: is told the reason if it has none, and what it has instead."""
    document = row.get(key) if isinstance(row, dict) else row
    if isinstance(document, str) and document.strip():
        return utf8(document)
    if isinstance(row, dict) and key not in row:
        tell(f'no field "{key}" in a row; --text-key names another', f" (has {', '.join(row)})")
    else:
        tell("no text in a row", "")
    return None


def _json_rows(text: str, tell: Tell) -> Iterator[tuple[int, object]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(text, tell)
    return enumerate(whole if isinstance(whole, list) else [whole], 1)


def _json_lines(text: str, tell: Tell) -> Iterator[tuple[int, object]]:
    # splitlines would also cut at U+2028, which JSON allows in strings
    for number, line in enumerate(text.split("\n"), 1):
        yield from json_line(number, line, tell)


def json_line(number: int, line: str | bytes, tell: Tell) -> Iterator[tuple[int, object]]:
    """(number, row) of a line that holds one."""
    try:
        if line.strip():
            yield number, json.loads(line)
    except (ValueError, RecursionError):
        tell("no JSON in a line", str(number))


def table_rows(text: TextIO, delimiter: str, tell: Tell) -> Iterator[tuple[int, object]]:
    """(line, row) of a table with a head."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than 128 kB
    # strict, or a quote that is not closed would take all the rows below it for its own
    table = csv.DictReader(text, delimiter=delimiter, restkey="more", strict=True)
    if table.fieldnames is None:
        return
    while True:
        first = table.line_num + 1
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            tell(f"no row of a table ({error})", str(first))
        else:
            yield table.line_num, row

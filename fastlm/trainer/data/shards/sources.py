"""What is named on the command line, cut into parts that are worked on one by one.

A source is a file or a folder with a name: of NAME=PATH, or else of the path. Its files, in the order of their names,
fall into parts of about one size, which depends on nothing but the files: a .jsonl between two lines, a .parquet
between two row groups, other files not at all. What is made of a part is then the same in any number of processes, and
after any interruption.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlm.trainer.data.corpus import check_there
from fastlm.trainer.data.files import SUFFIXES, Skipped, below
from fastlm.trainer.words import Refusal

COLUMNS = (".parquet", ".arrow")  # which pyarrow reads
NAME = re.compile(r"\w[\w.-]*")
PART = 64_000_000  # bytes of a part


@dataclass(frozen=True)
class Piece:
    """Some of a file. name: its path below the source. begin, end: bytes of a .jsonl, whose lines begin there; row
    groups of a .parquet; end None for the whole file.
    """

    path: Path
    name: str
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Part:
    """What one process works on at a time. number: its place in the source, from 0 on."""

    source: str
    number: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return f"{self.source}-{self.number:05}"


@dataclass(frozen=True)
class Source:
    """files: (path, name below it), in the names' order."""

    name: str
    path: Path
    files: tuple[tuple[Path, str], ...]

    def parts(self, size: int) -> list[Part]:
        """Its parts, of about so many bytes."""
        groups: list[list[Piece]] = [[]]
        room = size
        for piece, weight in _weighed(self.files, size):
            if groups[-1] and weight > room:
                groups.append([])
                room = size
            groups[-1].append(piece)
            room -= weight
        return [Part(self.name, number, tuple(pieces)) for number, pieces in enumerate(groups)]

    def state(self) -> list:
        """What of the files tells whether they changed: names, sizes and times."""
        return [[name, path.stat().st_size, path.stat().st_mtime_ns] for path, name in self.files]


def named(words: Sequence[str], skipped: Skipped) -> list[Source]:
    """The sources that are asked for, each NAME=PATH or PATH. skipped: is told what of a folder is not taken.

    Raises Refusal for a path that is not there, a source without text, and two of one name.
    """
    found: dict[str, Source] = {}
    for word in words:
        name, equals, path = word.partition("=")
        path = Path(path if equals and not Path(word).exists() else word)
        check_there((path,), "SOURCES:")
        name = name if path != Path(word) else _plain(path)
        if not NAME.fullmatch(name):
            raise Refusal(f"{word} would be a source named {name!r}; give NAME=PATH, with letters, digits, . _ and -")
        if name in found:
            raise Refusal(f"{found[name].path} and {path} are both sources named {name}; give NAME=PATH for one")
        files = _files(path, skipped)
        if not files:
            raise Refusal(f"{path} has no file with text ({'; '.join(skipped.lines()) or 'it is empty'})")
        if any(_suffix(path) in COLUMNS for path, _ in files) and importlib.util.find_spec("pyarrow") is None:
            raise Refusal(f"{path} has files that pyarrow reads, not installed here; cure: pip install 'fastlm[data]'")
        found[name] = Source(name, path, tuple(files))
    return list(found.values())


def _plain(path: Path) -> str:
    """The name of a source without one: its folder's, or its file's without suffixes."""
    name = path.resolve().name
    return name if path.is_dir() else name.removesuffix(".gz").rpartition(".")[0] or name


def _files(path: Path, skipped: Skipped) -> list[tuple[Path, str]]:
    if not path.is_dir():
        return [(path, path.name)]
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise Refusal(f"{path} holds the splits {', '.join(splits)} of a dataset; name one, such as {path / splits[0]}")
    if (state := path / "state.json").exists() and (path / "dataset_info.json").exists():  # datasets' save_to_disk
        state = json.loads(state.read_text())
        if state.get("_indices_data_files"):
            raise Refusal(f"{path} is a selection of another dataset; save it with flatten_indices()")
        return [(path / file["filename"], file["filename"]) for file in state["_data_files"]]
    return below(path, skipped.add, SUFFIXES + COLUMNS)


def _weighed(files: Sequence[tuple[Path, str]], size: int) -> Iterator[tuple[Piece, int]]:
    """Pieces no larger than a part where a file can be cut, and their bytes."""
    for path, name in files:
        whole = path.stat().st_size
        if path.suffix.lower() == ".jsonl":
            for begin in range(0, whole, size):
                end = min(begin + size, whole)
                yield Piece(path, name, begin, end), end - begin
        elif path.suffix.lower() == ".parquet":
            for group, weight in enumerate(_row_groups(path)):
                yield Piece(path, name, group, group + 1), weight
        else:
            yield Piece(path, name), whole


def _row_groups(path: Path) -> list[int]:
    """The bytes of each. Raises Refusal for what is no .parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise Refusal(f"{path} is no .parquet ({_first_line(error)})") from None
    return [found.row_group(i).total_byte_size for i in range(found.num_row_groups)]


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

"""The documents of a part, one after the other: of rows and tables never more than a few are in memory, of other files
one.
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastlm.trainer.data.files import DELIMITERS, Tell, json_line, read_documents, table_rows, text_of
from fastlm.trainer.data.shards.sources import Part, Piece
from fastlm.trainer.words import Refusal

BLOCK = 1 << 20  # bytes read at once
ROWS = 1024  # rows of a .parquet decoded at once
LONGEST = 1 << 30  # bytes of a file that is one document
MARK = re.compile("([^\0]*)\0(\\d+):(\\d+)")  # FILE, where a piece of it begins, a row of that


class Document(NamedTuple):
    """A text, and the row of a piece that it is, from 1 on."""

    text: str
    piece: Piece
    row: int

    @property
    def mark(self) -> str:
        """Where it stands, as `placed` understands it: of a piece it takes no reading of what is before."""
        return _mark(self.piece, self.row)


def documents(part: Part, text_key: str, tell: Tell) -> Iterator[Document]:
    """The documents of a part, in order.

    Args:
        part: which.
        text_key: the field of a row that holds its text.
        tell: is told of each row and file without text the reason, and its mark.

    Raises:
        Refusal: naming the file, for one that cannot be read.
    """
    for piece in part.pieces:
        for row, document in _numbered(piece, text_key, tell):
            yield Document(document, piece, row)


def _numbered(piece: Piece, key: str, tell: Tell) -> Iterator[tuple[int, str]]:
    rows = _rows(piece, key, lambda reason, row: tell(reason, _mark(piece, int(row))))
    if rows is None:
        if (size := piece.path.stat().st_size) > LONGEST:
            raise Refusal(
                f"{piece.path} is one document of {size:,} bytes, and {LONGEST:,} are the most; give a .jsonl, with a "
                "document in each line"
            )
        here = lambda reason, line: tell(reason, f"{piece.name}:{line}")
        try:
            yield from enumerate(read_documents(piece.path, key, here), 1)
        except Refusal as reason:
            tell(str(reason), piece.name)
        return
    with _readable(piece.path):
        for number, row in rows:
            where = lambda reason, what, number=number: tell(reason, f"{_mark(piece, number)}{what}")
            text = text_of(row, key, where)
            if text is not None:
                yield number, text


def _rows(piece: Piece, key: str, tell: Tell) -> Iterator[tuple[int, object]] | None:
    """(row of the piece, row) of a file that is read row by row; None for one that is not."""
    name = piece.path.name.lower()
    packed, suffix = name.endswith(".gz"), Path(name.removesuffix(".gz")).suffix
    if suffix == ".jsonl":
        return _lines(piece, packed, tell)
    if suffix in DELIMITERS:
        return _table(piece.path, packed, DELIMITERS[suffix], tell)
    if suffix == ".parquet":
        return _parquet(piece, key)
    return _arrow(piece.path, key) if suffix == ".arrow" else None


def _lines(piece: Piece, packed: bool, tell: Tell) -> Iterator[tuple[int, object]]:
    with gzip.open(piece.path) if packed else piece.path.open("rb", BLOCK) as file:
        if piece.begin:
            file.seek(piece.begin - 1)
        at = piece.begin - 1 + len(file.readline()) if piece.begin else 0  # a line that began in the piece before
        for number, line in enumerate(file, 1):
            if piece.end is not None and at >= piece.end:
                return
            at += len(line)
            yield from json_line(number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, tell)


def _table(path: Path, packed: bool, delimiter: str, tell: Tell) -> Iterator[tuple[int, object]]:
    with gzip.open(path) if packed else path.open("rb") as file:
        yield from table_rows(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter, tell)


def _parquet(piece: Piece, key: str) -> Iterator[tuple[int, object]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(piece.path) as file:
        columns = [key] if key in file.schema_arrow.names else None
        batches = file.iter_batches(batch_size=ROWS, row_groups=range(piece.begin, piece.end), columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _arrow(path: Path, key: str) -> Iterator[tuple[int, object]]:
    """Of a stream, as datasets writes it, or of a file with a footer."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        try:
            file = pa.ipc.open_file(mapped)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        except pa.ArrowInvalid:
            mapped.seek(0)
            batches = pa.ipc.open_stream(mapped)
        wanted = (batch.select([key]) if key in batch.schema.names else batch for batch in batches)
        slices = (batch.slice(at, ROWS) for batch in wanted for at in range(0, batch.num_rows, ROWS))
        yield from enumerate((row for some in slices for row in some.to_pylist()), 1)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Refusal for what goes wrong with a file."""
    try:
        yield
    except UnicodeDecodeError:
        raise Refusal(f"{path} is not UTF-8; `iconv -t UTF-8` converts it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except ValueError as error:  # pyarrow's are
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{path} cannot be read ({str(error).splitlines()[0]})") from None


def _mark(piece: Piece, row: int) -> str:
    return f"{piece.name}\0{piece.begin}:{row}" if piece.begin else f"{piece.name}:{row}"


def placed(found: dict, parts: Sequence[Part]) -> dict:
    """What `Skipped.to_json` says of parts of one source, with a place for each mark: FILE:LINE, or FILE:ROW where rows
    are no lines.
    """
    paths = {piece.name: piece.path for part in parts for piece in part.pieces}
    return {reason: [count, [_place(mark, paths) for mark in marks]] for reason, (count, marks) in found.items()}


def _place(mark: str, paths: Mapping[str, Path]) -> str:
    """What begins with a mark, with the place there instead."""
    found = MARK.match(mark)
    if found is None:
        return mark
    name, begin, row = found[1], int(found[2]), int(found[3])
    before = _rows_before if name.lower().endswith(".parquet") else _lines_before
    return f"{name}:{row + before(paths[name], begin)}{mark[found.end() :]}"


def _lines_before(path: Path, begin: int) -> int:
    with path.open("rb") as file:
        blocks, left, lines = iter(lambda: file.read(min(BLOCK, left)), b""), begin, 0
        for block in blocks:
            lines, left = lines + block.count(b"\n"), left - len(block)
        file.seek(begin - 1)
        return lines + (file.read(1) != b"\n")  # the one that goes on here is read there


def _rows_before(path: Path, begin: int) -> int:
    import pyarrow.parquet as pq

    found = pq.read_metadata(path)
    return sum(found.row_group(i).num_rows for i in range(begin))

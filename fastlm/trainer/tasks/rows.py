"""Which columns of a file make an example, and of which kind it is.

What is not taken is told with its place, as in data/files.py.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastlm.trainer.data.files import Tell, has_rows, read_rows
from fastlm.trainer.words import Refusal, utf8

# what an example is made of → the names that its column may have
COLUMNS = {
    "text": ("text", "question"),
    "second": ("text_pair", "text2"),
    "label": ("label",),
    "context": ("context",),
    "answer": ("answer",),
    "start": ("start", "answer_start"),
    "source": ("source", "input"),
    "target": ("target", "output"),
}
# a kind → what it needs; the first whose columns are all there is meant, unless --kind says another
NEEDS = {
    "spans": ("text", "context", "answer", "start"),
    "text-to-text": ("source", "target"),
    "classification": ("text", "label"),
    "regression": ("text", "label"),
}
MAY_HAVE = {"classification": ("second",), "regression": ("second",)}
ANSWERS = ("label", "answer", "start", "target")  # of which a row that is asked about has none


class Row(NamedTuple):
    """A labelled row of a file.

    Args:
        first: the text, the question or the source.
        second: the text beside it, or the context; None for none.
        answer: the label, the answer or the target, in words; the number of a regression, which is the same in words.
        start: of the answer in the context, in characters.
        group: rows of one group are held out together, or not at all; None for those whose texts are the same.
    """

    first: str
    second: str | None
    answer: str
    start: int = 0
    group: str | None = None

    @property
    def together(self) -> str:
        return self.group or "\0".join((self.first, self.second or ""))


def read(path: Path, flag: str, kind: str | None, tell: Tell, answered: bool = True) -> tuple[str, list[Row]]:
    """The kind of a file's rows, and the rows.

    Args:
        path: a .jsonl, .json, .csv or .tsv.
        flag: that named it.
        kind: a key of NEEDS; None for what the columns say.
        tell: of each row that is not taken it is told the reason, and the file with the line.
        answered: whether rows have answers; those that are asked about need none.

    Raises:
        Refusal: in one line, for what cannot be read, and for a file without rows of that kind.
    """
    given = f"{flag} {path}".strip()
    if not has_rows(path):
        raise Refusal(f"{given} is no .jsonl, .json, .csv or .tsv; give labelled rows as one of these")
    place = lambda line: f"{path.name}:{line}"
    try:
        found = read_rows(path, lambda reason, line: tell(reason, place(line)))
    except Refusal as error:
        raise Refusal(f"{given}: {error}") from None
    rows = [(line, row) for line, row in found if isinstance(row, dict)]
    for line, row in found:
        if not isinstance(row, dict):
            tell("no object in a row", place(line))
    if not rows:
        raise Refusal(f"{given} holds no rows; give one labelled example a row")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    kind = kind or _kind(columns, [row for _, row in rows], given)
    needs = [part for part in NEEDS[kind] if answered or part not in ANSWERS]
    if missing := [_words(part) for part in needs if not _there(part, columns)]:
        raise Refusal(f"{given} has {', '.join(columns)}, and --kind {kind} needs {' and '.join(missing)}")
    made = []
    for line, row in rows:
        try:
            made.append(_row(kind, row, needs))
        except ValueError as error:
            tell(str(error), place(line))
    if not made:
        raise Refusal(f"{given} holds no row of --kind {kind}: the first has {_shown(rows[0][1])}")
    return kind, made


def shown(kind: str, row: Row) -> dict[str, str]:
    """The texts of a row, under the first of their columns' names."""
    first, *others = (part for part in (*NEEDS[kind], *MAY_HAVE.get(kind, ())) if part not in ANSWERS)
    made = {COLUMNS[first][0]: row.first}
    return made | ({COLUMNS[others[0]][0]: row.second} if row.second is not None else {})


def labels_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """The labels there are, whole numbers in their order, others in the alphabet's."""
    labels = {row.answer for row in rows}
    whole = all(label.removeprefix("-").isdecimal() for label in labels)
    return tuple(sorted(labels, key=int if whole else None))


def _kind(columns: Sequence[str], rows: list[dict], file: str) -> str:
    kinds = [kind for kind, parts in NEEDS.items() if all(_there(part, columns) for part in parts)]
    if not kinds:
        wanted = "; ".join(f"{', '.join(map(_words, parts))} ({kind})" for kind, parts in NEEDS.items())
        raise Refusal(f"{file} has the columns {', '.join(columns)}; give those of one kind: {wanted}")
    if kinds[0] != "classification":
        return kinds[0]
    labels = [_value("label", row) for row in rows]
    numbers = [label for label in labels if label is not None and _fraction(label) is not None]
    some = any(_fraction(label) for label in numbers)
    return "regression" if some and len(numbers) == sum(label is not None for label in labels) else kinds[0]


def _fraction(label: object) -> bool | None:
    """Whether a label is a number written with a point or an exponent; None for what is no number."""
    if isinstance(label, bool) or not isinstance(label, (int, float, str)):
        return None
    try:
        float(label)
    except ValueError:
        return None
    return not str(label).strip().lstrip("+-").isdecimal()


def _row(kind: str, row: dict, needs: Sequence[str]) -> Row:
    """Raises ValueError, saying what a row lacks."""
    parts = {part: _value(part, row) for part in (*needs, *MAY_HAVE.get(kind, ()))}
    for part in needs:
        if parts[part] is None or not str(parts[part]).strip():
            raise ValueError(f"no {_words(part)} in a row")
    text = {part: utf8(str(value)) for part, value in parts.items() if value is not None}
    if not {*ANSWERS} & {*needs}:
        return Row(text.get("text") or text["source"], text.get("second") or text.get("context"), "")
    if kind == "text-to-text":
        return Row(text["source"], None, text["target"])
    if kind == "spans":
        return _span(text)
    if kind == "regression":
        try:
            number = float(text["label"])
        except ValueError:
            raise ValueError("a label that is no number in a row") from None
        if not math.isfinite(number):
            raise ValueError("a label that is not finite in a row")
    label = {"True": "true", "False": "false"}.get(text["label"], text["label"])  # as JSON has them
    return Row(text["text"], text.get("second"), label.strip())


def _span(text: dict[str, str]) -> Row:
    start, answer, context = text["start"], text["answer"], text["context"]
    if not start.isdecimal():
        raise ValueError("a start that is no whole number in a row")
    if context[int(start) : int(start) + len(answer)] != answer:
        raise ValueError("an answer that does not stand at its start in a row")
    return Row(text["text"], context, answer, int(start))


def _there(part: str, columns: Sequence[str]) -> bool:
    return any(name in columns for name in COLUMNS[part])


def _value(part: str, row: dict) -> object:
    return next((row[name] for name in COLUMNS[part] if name in row), None)


def _words(part: str) -> str:
    """The names that a part's column may have."""
    return " or ".join(f'"{name}"' for name in COLUMNS[part])


def _shown(row: dict) -> str:
    return ", ".join(f"{name} {str(value)[:40]!r}" for name, value in row.items())

"""The task that stands in where none is given: whether some lines of Python's standard library are code, a comment or a
docstring.

Every machine has the sources, and Python's own parser says what is what. Marks that would tell are taken off: the # of
comments, the quotes of docstrings, the indentation. Whole files are held out of the labelled rows; a model that was
pretrained on the library may have read their text, not what it is.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from fastlm.trainer.data.corpus import default_files
from fastlm.trainer.data.files import read_documents
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.words import Refusal

NAME = "code, comments and docstrings of {}"
SPLIT = "held out: a tenth of the files, drawn by --seed"
LINES = 3  # of a row at most
LEAST = 20  # characters of a row
OF_FILE = 10  # rows of each label from a file at most
FILES = 150


def rows() -> tuple[str, list[Row]]:
    """What the rows are called, and the rows, as many of each label. Raises Refusal if there are no sources here."""
    try:
        name, files = default_files()
    except Refusal as error:
        raise Refusal(f"{str(error).partition(';')[0]}; give labelled rows with --task FILE") from None
    made: dict[str, list[Row]] = defaultdict(list)
    for path, short in files[:: -(-len(files) // FILES)]:
        for label, texts in _texts(path).items():
            texts = [text for text in map(dedent, texts) if len(text) >= LEAST and "#" not in text]
            apart = max(1, len(texts) // OF_FILE)
            made[label] += [Row(text, None, label, group=short) for text in texts[::apart][:OF_FILE]]
    least = min(map(len, made.values()))
    even = lambda found: [found[i * len(found) // least] for i in range(least)]
    return NAME.format(name), [row for label in sorted(made) for row in even(made[label])]


def _texts(path: Path) -> dict[str, list[str]]:
    """Label → some lines of a file each; none of a file that Python cannot parse."""
    try:
        (source,) = read_documents(path, "text", lambda reason, place: None)
        tree, lines = ast.parse(source), source.split("\n")
    except (Refusal, SyntaxError, ValueError, RecursionError):
        return {}
    nodes = list(ast.walk(tree))
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings on one line, too
    long = [node for node in strings if node.end_lineno > node.lineno or id(node) in alone]
    quoted = {i for node in long for i in range(node.lineno, node.end_lineno + 1)}
    bare = [i for i, line in enumerate(lines, 1) if line.lstrip().startswith("#") and i not in quoted]
    code = [i for i, line in enumerate(lines, 1) if line.strip() and "#" not in line and i not in quoted]
    docstrings = filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED)))
    return {
        "code": ["\n".join(lines[i - 1] for i in run) for run in _runs(code)],
        "comment": ["\n".join(lines[i - 1].lstrip().lstrip("#") for i in run) for run in _runs(bare)],
        "docstring": ["\n".join([line for line in text.splitlines() if line.strip()][:LINES]) for text in docstrings],
    }


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    """Numbers that follow one another, LINES of them at most."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == LINES):
            yield run
            run = []
        run.append(number)
    if run:
        yield run

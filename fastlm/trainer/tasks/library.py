"""The task that stands in where none is given: which package of Python's standard library some lines are of.

Every machine has the sources. What tells packages apart is their vocabulary; no line that names the package is left
in, or a search for its name would do as well. Whole files are held out, so that a model cannot know the file instead.
"""

import sysconfig
from pathlib import Path

from fastlm.trainer.data.files import Skipped, below, read_documents
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.words import Refusal

NAME = "lines of the standard library, and their package"
SPLIT = "held out: a tenth of the files, drawn by --seed"
PACKAGES = ("asyncio", "distutils", "email", "http", "importlib", "json", "logging", "multiprocessing", "tkinter",
            "unittest", "urllib", "xml")  # fmt: skip
LINES = 6  # of a row
MOST = 400  # rows of a package


def rows() -> list[Row]:
    """The rows: runs of LINES lines that are not empty, evenly from all files of a package. Raises Refusal if there are
    no sources here.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    made = []
    for package in PACKAGES:
        folder = library / package
        files = below(folder, Skipped().add, (".py",), {"test", "tests"}) if folder.is_dir() else []
        found = [row for path, name in files for row in _of_file(path, f"{package}/{name}", package)]
        step = max(1, len(found) / MOST)
        made += [found[int(i * step)] for i in range(min(MOST, len(found)))]
    if len({row.answer for row in made}) < 2:
        raise Refusal("the sources of Python's standard library are not there; give labelled rows with --task FILE")
    return made


def _of_file(path: Path, name: str, package: str) -> list[Row]:
    try:
        (text,) = read_documents(path, "text", lambda reason, place: None)
    except Refusal:
        return []
    lines = [line for line in text.splitlines() if line.strip() and package not in line.lower()]
    texts = ("\n".join(lines[i : i + LINES]) for i in range(0, len(lines) - LINES + 1, LINES))
    return [Row(text, None, package, group=name) for text in texts]

"""The site: it builds without a warning, no page is forgotten, its code runs, and no entry of a registry is missing.

Blocks that it includes from README.md are tried by test_readme.py, and examples/ by test_examples.py
and tests/optim/test_trainers.py.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from snippets import named, run, snippets

from fastlm.models.presets import PRESETS
from fastlm.objectives import OBJECTIVES
from fastlm.optim import OPTIMIZERS
from fastlm.positions import SCHEMES, Position

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCKS = [block for page in PAGES for block in snippets(page.read_text())]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    return generate


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install '.[docs]'")
def test_it_builds_strictly_and_its_pages_load_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {path.parent.name: path.read_text() for path in tmp_path.glob("*/index.html")}
    assert {page.stem for page in PAGES} - {"index"} <= built.keys()
    for name, page in built.items():
        loaded = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"?https?:[^ >]+", page)
        assert not loaded, f"{name} loads {loaded}"
        assert "<!-- generate" not in page and "--8&lt;--" not in page


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_includes_is_there_and_is_generated(generate, page):
    text = page.read_text()
    assert set(generate.MARK.findall(text)) <= generate.PARTS.keys()
    for source, section in re.findall(r'--8<-- "([\w./]+)(?::(\w+))?"', text):
        included = (ROOT / source).read_text()
        for end in ("start", "end"):
            assert not section or included.count(f"<!-- --8<-- [{end}:{section}] -->") == 1


def test_every_example_is_shown():
    """In a fence of `{ .python }`, which ruff does not take for code of its own to lay out."""
    site = "".join(page.read_text() for page in PAGES)
    for example in (ROOT / "examples").glob("*.py"):
        assert f'``` {{ .python }}\n--8<-- "examples/{example.name}"\n```' in site


@pytest.mark.parametrize("snippet", BLOCKS, ids=named)
def test_snippets_run_as_they_stand(snippet):
    run(snippet)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_an_entry_whose_code_makes_it_and_a_picture(generate, name):
    assert generate.entry(name).startswith(f"## {name}\n")
    made = eval(generate.code(name), {"fastlm": generate.fastlm})
    assert type(made) is SCHEMES[name]
    assert generate.picture(name).startswith(b"<?xml")


def test_a_new_scheme_appears_by_itself(generate):
    class New(Position, name="appears-by-itself"):
        """Two for each step back (nobody 2026)."""

        def __init__(self, heads: int):
            super().__init__()
            self.heads = heads

        def bias(self, distance):
            return -2.0 * distance.abs().expand(self.heads, -1)

    try:
        entry = generate.schemes().split("## appears-by-itself\n")[1]
        assert "Two for each step back" in entry and "New(heads=4)" in entry and "adds a number to each score" in entry
        drawn = generate.added(New(4))
    finally:
        del SCHEMES["appears-by-itself"]
    distance = torch.arange(1 - generate.LENGTH, generate.LENGTH)
    torch.testing.assert_close(drawn, -2.0 * distance.abs().double().expand(4, -1), rtol=1e-6, atol=1e-5)


def test_tables_hold_what_registries_hold(generate):
    for rows, registry in (("presets", PRESETS), ("objectives", OBJECTIVES), ("optimizers", OPTIMIZERS)):
        first = [line.split("|")[1] for line in generate.PARTS[rows]().splitlines()[2:]]
        assert [re.sub(r".*`(.*)`.*", r"\1", cell).strip() for cell in first] == list(registry)
    assert all(name in generate.PARTS["memory-fp32"]() for name in OPTIMIZERS)

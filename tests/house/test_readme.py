"""The README's own code, run as it stands."""

import re
from pathlib import Path

import pytest
from snippets import named, run, snippets

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("snippet", snippets(README), ids=named)
def test_snippets_run_as_they_stand(snippet):
    run(snippet)


def test_it_holds_the_two_commands_and_no_gap():
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert [re.search(r"'(\.\[\w+\])'", c)[1] for c in commands] == [".[train]", ".[test]"]
    assert all("-c constraints.txt" in c for c in commands)
    assert "@@" not in README

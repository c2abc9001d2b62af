"""The README's own code, run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NEEDS_A_RUN = "runs/my-run"


@pytest.mark.parametrize(
    "snippet", [s for s in SNIPPETS if NEEDS_A_RUN not in s], ids=lambda s: s.splitlines()[-1][:40]
)
def test_snippets_run_as_they_stand(snippet):
    done = subprocess.run([sys.executable, "-W", "error", "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_holds_the_two_commands_and_no_gap():
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert [re.search(r"'(\.\[\w+\])'", c)[1] for c in commands] == [".[train]", ".[test]"]
    assert all("-c constraints.txt" in c for c in commands)
    assert "@@" not in README

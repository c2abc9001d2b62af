"""The fenced Python blocks of a page, run as they stand."""

import re

from forked import imported

FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)
NEEDS_A_RUN = "runs/my-run"


def snippets(markdown: str) -> list[str]:
    """Every block but those that open a folder that a run would have made."""
    return [block for block in FENCED.findall(markdown) if NEEDS_A_RUN not in block]


def named(snippet: str) -> str:
    """A test's name for it."""
    return snippet.splitlines()[-1][:40]


def run(snippet: str) -> None:
    """Fail, with what it says, unless it runs alone and without a warning."""
    done = imported("-W", "error").run(snippet)
    assert done.returncode == 0, done.stderr

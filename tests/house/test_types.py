"""Types of the public surface, as mypy reads them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm.nn import functional

HERE = Path(__file__).parent
SURFACE = (HERE / "surface.py").read_text()


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    """With a planted error, so that what passes was read."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install '.[test]'")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import fastlm, torch\nq = torch.zeros(1, 1, 1, 1)\nfastlm.attention(q, q, q, causal='yes')\n")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--follow-imports=silent", "--python-version=3.11"]
    command += [
        "--ignore-missing-imports",
        "--cache-dir",
        str(tmp_path / "cache"),
        str(HERE / "surface.py"),
        str(wrong),
    ]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert "wrong.py:3: error" in done.stdout, done.stdout + done.stderr
    assert all("wrong.py:3" in line for line in done.stdout.splitlines()), done.stdout


def test_what_type_checkers_see_of_attention_is_its_signature():
    tree = ast.parse(Path(functional.__file__).read_text())
    (options,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Options")
    fields = {node.target.id: ast.unparse(node.annotation) for node in options.body if isinstance(node, ast.AnnAssign)}
    definition = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "attention"][-1]
    given = {argument.arg: ast.unparse(argument.annotation) for argument in definition.args.kwonlyargs}
    assert given == fields | {"return_lse": "bool"}


@pytest.mark.parametrize("name", fastlm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fastlm, name) is not None and name in dir(fastlm)
    assert fastlm.__getattr__(name).__doc__, f"fastlm.{name} has no docstring"

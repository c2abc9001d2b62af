"""Types of the public surface, as mypy reads them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm.nn import arguments, functional

HERE = Path(__file__).parent
SURFACE = (HERE / "surface.py").read_text()


# what it reads: of torch, the types that we name; of transformers and the rest, nothing
MYPY = """
[mypy]
python_version = 3.11
follow_imports = skip
ignore_missing_imports = true
[mypy-fastlm.*,torch,torch._tensor,torch.nn.*,torch.optim.*,torch.amp.*]
follow_imports = silent
"""
WRONG = """
import fastlm, torch
q = torch.zeros(1, 1, 1, 1)
fastlm.attention(q, q, q, causal='yes')
q.no_such_method()
"""


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    """With planted errors, so that what passes was read, torch's types too."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install '.[test]'")
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", str(tmp_path / "mypy.ini")]
    command += ["--cache-dir", str(tmp_path / "cache"), str(HERE / "surface.py"), str(tmp_path / "wrong.py")]
    said = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True).stdout
    assert "wrong.py:4: error" in said and 'wrong.py:5: error: "Tensor" has no attribute' in said, said
    assert all("wrong.py:4" in line or "wrong.py:5" in line for line in said.splitlines()), said


def fields_of(tree: ast.Module, name: str) -> dict[str, str]:
    (options,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.target.id: ast.unparse(node.annotation) for node in options.body if isinstance(node, ast.AnnAssign)}


def test_what_type_checkers_see_of_attention_is_its_signature():
    tree, common = (ast.parse(Path(module.__file__).read_text()) for module in (functional, arguments))
    fields = fields_of(tree, "Options") | fields_of(common, "CommonOptions")
    definition = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "attention"][-1]
    given = {argument.arg: ast.unparse(argument.annotation) for argument in definition.args.kwonlyargs}
    assert given == fields | {"return_lse": "bool"}


@pytest.mark.parametrize("name", fastlm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fastlm, name) is not None and name in dir(fastlm)
    assert fastlm.__getattr__(name).__doc__, f"fastlm.{name} has no docstring"

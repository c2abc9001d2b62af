"""The house: rooms stand in one order and import downward alone, `import fastlm` is light, and nothing of ours hides
another package.
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastlm"
# Lowest first; rooms side by side do not know each other. A file imports from its own room and from lower ones.
LIBRARY = [{"checks"}, {"backends", "masks"}, {"ops"}, {"positions", "optim"}, {"nn", "amp"}]
ABOVE = [{"models"}, {"objectives", "interop"}, {"trainer"}, {"__main__"}]
ROOMS = LIBRARY + ABOVE
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)
LONGEST, ENTRIES, WIDEST = 300, 16, 120


def floor(room: str) -> int:
    found = [i for i, rooms in enumerate(ROOMS) if room in rooms]
    assert found, f"fastlm/{room} has no place in ROOMS; put it where it belongs"
    return found[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """The modules of fastlm that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastlm":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if is_module(whole) else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("fastlm."))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    mine = module_of(path).split(".")
    for other in imports(path):
        room = other.split(".")[1] if "." in other else None
        if len(mine) < 2 or room in (None, mine[1], "kernels"):
            continue
        assert floor(room) < floor(mine[1]), f"{path.relative_to(ROOT)} imports {other}, which stands no lower"


HOUSES = sorted(p for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE)


@pytest.mark.parametrize("path", HOUSES, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_a_room_says_what_lives_in_it(path):
    paragraph = ast.get_docstring(ast.parse(path.read_text())) or ""
    rooms = {f"{inner.parent.name}/" for inner in path.parent.glob("*/__init__.py")}
    files = {file.name for file in path.parent.glob("*.py")} - {"__init__.py"}
    assert not {name for name in files | rooms if name not in paragraph}


def test_no_two_test_files_have_one_name():
    """pytest imports them by their bare names."""
    names = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_room_has_a_circle():
    """Imports at the top of files, which run when a file is first imported, have an order."""
    graph = {module_of(p): {m for m in top_imports(p) if m != module_of(p)} for p in FILES if p.name != "__init__.py"}
    TopologicalSorter({name: needs & graph.keys() for name, needs in graph.items()}).prepare()


def top_imports(path: Path) -> set[str]:
    top = ast.Module([n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    found = set()
    for node in top.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlm"):
            names = [f"{node.module}.{a.name}" for a in node.names]
            found |= {name if is_module(name) else node.module for name in names}
    return found


def test_the_library_stands_without_what_is_above(tmp_path):
    """Every op, scheme, optimizer and module imports and runs with the upper storeys deleted from disk."""
    shutil.copytree(PACKAGE, tmp_path / "fastlm", symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    for room in set().union(*ABOVE):
        target = tmp_path / "fastlm" / room
        shutil.rmtree(target) if target.is_dir() else target.with_suffix(".py").unlink()
    code = """
import torch, fastlm, fastlm.backends.info
from fastlm.positions import SCHEMES, make
q = torch.randn(1, 2, 8, 16, requires_grad=True)
for name, scheme in SCHEMES.items():
    position = make(name, dim=32, heads=2, head_dim=16, context=64, causal=True)
    out = fastlm.attention(q, q, q, position=None if scheme.embeds() else position, causal=True)
    out.sum().backward()
block = fastlm.nn.Attention(32, heads=2, position="rope")
for make_optimizer in fastlm.optim.OPTIMIZERS.values():
    scaler, optimizer = fastlm.amp.GradScaler("cpu"), make_optimizer(block.parameters(), lr=1e-3)
    scaler.scale(block(torch.randn(1, 8, 32)).sum()).backward()
    scaler.step(optimizer)
print(len(list(fastlm.backends.info.describe())), fastlm.__file__)
"""
    lines, where = run_python(code, cwd=tmp_path, env=environment(tmp_path)).split()
    assert int(lines) > 10 and Path(where).is_relative_to(tmp_path)


def environment(path: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(path)}


def test_the_top_level_can_be_taken_in_at_a_glance():
    tracked = subprocess.run(["git", "ls-files", "fastlm"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("this is no git checkout")
    entries = {Path(line).parts[1] for line in tracked.stdout.splitlines()}
    assert len(entries) <= ENTRIES, sorted(entries)


SOURCES = [p for room in ("fastlm", "kernels", "csrc") for p in sorted((ROOT / room).rglob("*.*"))]
NATIVE = (".h", ".cpp", ".cu", ".cuh", ".c")
SOURCES = [p for p in SOURCES if p.suffix in (".py", *NATIVE)]


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not long


def test_code_is_laid_out():
    """ruff and clang-format as pyproject.toml and .clang-format have them; no line beyond the last column."""
    for tool in ("ruff", "clang-format"):
        if importlib.util.find_spec(tool.replace("-", "_")) is None:
            pytest.skip(f"{tool} is not installed: pip install '.[test]'")
    native = [p for room in ("csrc", "tests") for p in sorted((ROOT / room).rglob("*.*")) if p.suffix in NATIVE]
    for command in (
        ["ruff", "check", "--quiet", "--no-cache", ROOT],
        ["ruff", "format", "--check", "--quiet", "--no-cache", ROOT],
        ["clang-format", "--dry-run", "--Werror", *native],
    ):
        tool = Path(sysconfig.get_path("scripts")) / command[0]
        done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wide = [
        f"{p.name}:{i}" for p in native for i, line in enumerate(p.read_text().splitlines(), 1) if len(line) > WIDEST
    ]
    assert not wide


def test_kernels_import_no_more_than_torch_and_triton():
    """And the words of dropout, a leaf that imports torch alone."""
    allowed = ("torch", "triton", *sys.stdlib_module_names)
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                ours = name.startswith(("fastlm.kernels", "fastlm.backends.philox"))
                assert ours or name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_native_code_includes_no_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "torch/" not in path.read_text() and "ATen" not in path.read_text(), path


def run_python(code: str, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module, more", [("fastlm", ("safetensors",)), ("fastlm.interop", ())])
def test_import_is_light(module, more):
    heavy = ("tokenizers", "transformers", "tyro", "matplotlib", "triton", "torch._dynamo", "fastlm.kernels", *more)
    loaded = run_python(f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])", cwd=ROOT)
    assert loaded.strip() == "[]"


def test_kernels_is_hugging_faces():
    """`kernels` is another project's package, which transformers imports; ours is reachable as fastlm.kernels alone."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed: pip install '.[test]'")
    code = (
        "import kernels, importlib.util as u; print(kernels.__file__, u.find_spec('fastlm.kernels.attention').origin)"
    )
    theirs, ours = run_python(code, cwd=ROOT).split()
    assert "site-packages" in theirs
    assert Path(ours).resolve().name == "attention.py" and Path(ours).parent.name == "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()

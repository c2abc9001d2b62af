"""The house: imports run one way, `import fastlm` is light, and nothing of ours hides another package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lowest first; a module imports only from levels below its own. A package is one level: its files may share helpers.
LEVELS = [
    {"native", "masks", "philox", "frequencies", "schedule", "words"},
    {"dispatch", "noise", "plugins"},
    {"ops"},
    {"positions"},
    {"functional"},
    {"nn", "optim"},
    {"amp", "model"},
    {"presets", "interop"},
    {"corpus", "machine"},
    {"data"},
    {"objectives", "checkpoint"},
    {"config"},
    {"trainer"},
    {"budget", "plan", "report"},
    {"artefacts"},
    {"run"},
    {"cli"},
    {"__main__"},
]
SOURCES = sorted(p for p in (ROOT / "fastlm").rglob("*.py") if p.name != "__init__.py" and "kernels" not in p.parts)


def level(module: str) -> int:
    found = [i for i, names in enumerate(LEVELS) if module in names]
    assert found, f"fastlm.{module} has no level; add it to LEVELS where it belongs"
    return found[0]


def imports(path: Path) -> set[str]:
    """The parts of fastlm that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastlm":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlm."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastlm.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    parts = path.relative_to(ROOT / "fastlm").with_suffix("").parts
    mine = level(parts[0])
    for other in imports(path) - {"kernels"}:
        if parts[0] == other:
            continue
        assert level(other) < mine, f"{path.name} imports fastlm.{other}, which stands no lower"


def test_kernels_import_no_more_than_torch_and_triton():
    """And the words of dropout, a leaf that imports torch alone."""
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in ("torch", "triton", *sys.stdlib_module_names) or name.startswith(("fastlm.kernels", "fastlm.philox")), f"{path.name} imports {name}"


def test_native_code_includes_no_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "torch/" not in path.read_text() and "ATen" not in path.read_text(), path


def run_python(code: str, **options) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options).stdout


def test_import_is_light():
    heavy = ("tokenizers", "transformers", "tyro", "matplotlib", "triton", "safetensors", "fastlm.kernels")
    loaded = run_python(f"import fastlm, sys; print([m for m in {heavy} if m in sys.modules])", cwd=ROOT)
    assert loaded.strip() == "[]"


def test_kernels_is_hugging_faces():
    """`kernels` is another project's package, which transformers imports; ours is reachable as fastlm.kernels alone."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed: pip install '.[test]'")
    code = "import kernels, importlib.util as u; print(kernels.__file__); print(u.find_spec('fastlm.kernels.attention').origin)"
    theirs, ours = run_python(code, cwd=ROOT).split()
    assert "site-packages" in theirs
    assert Path(ours).resolve().name == "attention.py" and Path(ours).parent.name == "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()

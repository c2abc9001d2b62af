"""What is published: the source distribution holds all that a build needs, and its wheel all that an import needs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT = ("build", ".git", "runs", "__pycache__", "*.egg-info", "*.so", "build.json", ".*")
SDIST = "from setuptools import build_meta; print(build_meta.build_sdist('out'))"
NO_COMPILER = {"CXX": "no-such-compiler", "CUDA_HOME": "no-such-folder"}  # compiling is for other tests


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The source distribution of this tree, unpacked."""
    for name in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    called(sys.executable, "-c", SDIST, cwd=folder / "tree")
    (archive,) = (folder / "tree" / "out").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sources) -> Path:
    """Its wheel, built from nothing else."""
    command = "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", "out", "."
    called(sys.executable, *command, cwd=sources, **NO_COMPILER)
    (built,) = (sources / "out").glob("*.whl")
    return built


def called(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_source_distribution_holds_what_a_build_reads(sources):
    for path in [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        assert (sources / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_the_wheel_holds_the_library_and_its_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    python = [p.relative_to(ROOT).as_posix() for p in (ROOT / "fastlm").rglob("*.py") if "kernels" not in p.parts]
    kernels = [f"fastlm/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")]
    assert {*python, *kernels, "fastlm/py.typed", "fastlm/build.json"} <= names
    assert {name.split("/")[0] for name in names} == {"fastlm", next(n for n in names if "METADATA" in n).split("/")[0]}


def test_the_wheel_works_where_the_checkout_is_not(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, fastlm; from fastlm.kernels import terms; q = torch.randn(1, 2, 8, 16); print(fastlm.__file__);"
        "fastlm.attention(q, q, q, position=fastlm.positions.ALiBi(2))"
    )
    home = called(sys.executable, "-W", "ignore", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert Path(home.strip()).is_relative_to(tmp_path)

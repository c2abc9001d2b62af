"""fastlm._cuda compiled as C++: its kernels on the host, barriers, shuffles and tensor cores in software
(tests/csrc/on_host).
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from building import ROOT
from torch import Tensor

ON_HOST = ROOT / "tests" / "csrc" / "on_host"
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)\s*<<<(.+?), (\w+), (\w+), \w+>>>\(([^;]*)\);")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
FLAGS += ["-fvisibility=hidden", "-fno-gnu-unique"]  # modules side by side share nothing
_built_before: list[str] = []


def optimizers_and_all(folder: Path) -> ModuleType:
    """The whole module."""
    cuda = _sources(folder)
    (cuda / "attention" / "module.cpp").unlink()
    return _built([path for path in sorted(cuda.rglob("*.*")) if path.suffix in (".cu", ".cpp")], folder)


def attention(folder: Path) -> ModuleType:
    """Attention alone."""
    room = _sources(folder) / "attention"
    return _built([path for path in sorted(room.iterdir()) if path.suffix in (".cu", ".cpp")], folder)


def changed(module: ModuleType, folder: Path, kernel: str, file: str, old: str, new: str) -> ModuleType:
    """`attention`'s module with another text in one file of its room, for what `kernel`.cu has of it; that kernel is
    compiled for fp16 and up to 64 channels alone, for time.
    """
    room, made = _sources(folder) / "attention", Path(module.__file__).parent / "csrc" / "cuda" / "attention"
    text = (room / file).read_text()
    assert old in text, f"{file} does not say {old!r}"
    (room / file).write_text(text.replace(old, new))
    choice = re.compile(r"    if \(dtype == F16\) .*?\n    else .*?\n", re.DOTALL)
    choices, n = choice.subn("    run(f16(), Small());\n", (room / "kernels.h").read_text())
    assert n == 1, "kernels.h chooses in another way"
    (room / "kernels.h").write_text(choices)
    others = [path for path in made.glob("*.o") if path.stem != kernel]
    return _built([room / f"{kernel}.cu"], folder, others, ["-O0"])


def watch(module: ModuleType, name: str) -> ctypes.c_long:
    """A number of the host's own, such as bank_conflicts, to be read and set."""
    return ctypes.c_long.in_dll(ctypes.CDLL(module.__file__), name)


class Watched:
    """The module, whose kernels may read through copies and the read-only cache what their launch was given alone."""

    def __init__(self, module: ModuleType):
        self._module, self._library = module, ctypes.CDLL(module.__file__)

    def give(self, x: Tensor | None) -> None:
        if x is not None and x.numel():
            extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            begin, end = x.data_ptr(), x.data_ptr() + extent * x.element_size()
            self._library.let_read(ctypes.c_size_t(begin), ctypes.c_size_t(end))

    def __getattr__(self, name: str) -> Callable:
        call = getattr(self._module, name)
        if name.endswith("workspace"):
            return call

        def launch(*args) -> None:
            try:
                call(*args)
            finally:
                self._library.let_read_anything()

        return launch


def _sources(folder: Path) -> Path:
    """csrc/cuda with launches as calls and instructions as functions."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    shutil.copytree(ON_HOST / "attention", cuda / "attention", dirs_exist_ok=True)
    for path in (path for path in cuda.rglob("*.*") if path.is_file()):
        text = LAUNCH.sub(r"run(\2, \3, \4, [&] { \1(\5); });", path.read_text())
        assert "<<<" not in text, f"a launch in {path.name} is written in another way"
        path.write_text(text)
    return cuda


def _built(sources: list[Path], folder: Path, objects: list[Path] = (), flags: list[str] = ()) -> ModuleType:
    """Of sources, which are compiled with these flags, and of objects."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed: pip install pybind11")
    compiler = shutil.which("g++")
    probe = [compiler or "g++", "-x", "c++", "-include", "ucontext.h", "-fsyntax-only", "-"]
    if compiler is None or subprocess.run(probe, input=b"", capture_output=True).returncode:
        pytest.skip("g++ and ucontext.h, for threads that take turns, were not found")
    includes = [f"-I{path}" for path in (ON_HOST, pybind11.get_include(), sysconfig.get_paths()["include"])]
    compiled = [path.with_suffix(".o") for path in sources]
    compiling = [
        subprocess.Popen([compiler, *FLAGS, *flags, *includes, "-x", "c++", "-c", str(path), "-o", str(to)])
        for path, to in zip(sources, compiled, strict=True)
    ]
    assert not any([process.wait() for process in compiling])
    # pybind11 keeps modules by their names, and would hand out the first for every other
    name = f"_cuda_{len(_built_before)}"
    _built_before.append(name)
    library, alias = folder / f"{name}.so", f"-Wl,--defsym=PyInit_{name}=PyInit__cuda"
    subprocess.run([compiler, "-shared", alias, *map(str, [*compiled, *objects]), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

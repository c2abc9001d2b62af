"""Every C++ kernel (support/reach.py) on builds that watch memory, undefined behaviour and threads, and stop at the
first fault."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import ROOT, built

from fastlm.backends import native

pytestmark = pytest.mark.slow
SUPPORT = ROOT / "tests" / "support"


def watched(folder: Path, kind: str, library: str, what: str, isas: list[str], **options: str) -> None:
    """Build these instruction sets with -fsanitize=kind and run reach.py's `what`."""
    if native.cpp_missing(torch.device("cpu")):
        pytest.skip(native.cpp_missing(torch.device("cpu")))
    find = lambda name: subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    # the second so that the first finds what throws exceptions
    preload = [find(name).stdout.strip() for name in (library, "libstdc++.so.6") if shutil.which("g++")]
    if not preload or not all(Path(path).is_absolute() for path in preload) or sys.platform != "linux":
        pytest.skip(f"GCC's {library} is not here: install g++ on Linux")
    compiler = shlex.join(["g++", "-include", str(ROOT / "tests" / "csrc" / "on_host" / "amx.h")])
    no_cuda = dict(CUDA_HOME="/nonexistent", CUDA_PATH="")
    lib = built(folder, FASTLM_SANITIZE=kind, FASTLM_ISAS=" ".join(isas), CXX=compiler, **no_cuda)
    environment = os.environ | options | {"PYTHONPATH": str(lib), "LD_PRELOAD": " ".join(preload)}
    command = [sys.executable, str(SUPPORT / "reach.py"), what]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("reached the end\n"), done.stdout[-5000:]


def test_memory_and_undefined_behaviour(tmp_path):
    """In every instruction set that the processor has; and where it has the rest of what they need, tiles of bf16 (AMX)
    in software."""
    isas = native.cpu().available()
    isas += ["amx"] if "avx512_bf16" in isas else []
    leaks = "detect_leaks=0"  # CPython itself keeps what it allocated at start
    stop = "halt_on_error=1:print_stacktrace=1"
    watched(tmp_path, "address,undefined", "libasan.so", "memory", isas, ASAN_OPTIONS=leaks, UBSAN_OPTIONS=stop)


def test_threads(tmp_path):
    """Two and seven threads in turn. PyTorch and its OpenMP were not built for this sanitizer, which cannot see
    how their threads wait for one another: what they call is left out, and the extension starts threads of its own
    (parallel.h)."""
    theirs = [f"called_from_lib:{library}.so" for library in ("libtorch_cpu", "libtorch_python", "libgomp")]
    # the last: the C library, as their threads end
    (tmp_path / "theirs").write_text("\n".join([*theirs, "race:_dl_deallocate_tls"]))
    # Python's end trips over a lock of PyTorch
    options = f"halt_on_error=1:report_mutex_bugs=0:suppressions={tmp_path / 'theirs'}"
    watched(tmp_path, "thread", "libtsan.so", "threads", [], TSAN_OPTIONS=options)

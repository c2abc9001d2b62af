"""The C++ extension: bounds at the launchers, instruction sets that do not leak into each other, and what a build
without a compiler says.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm.backends import native

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
F32 = 0


def test_it_is_built_and_chosen():
    assert native.cpp_missing(CPU) is None, native.cpp_missing(CPU)
    assert native.cpu().active() in native.cpu().available()
    assert "portable" in native.cpu().available()


def test_it_says_where_it_cannot_compute():
    assert "these are on cuda" in native.cpp_missing(torch.device("cuda"))
    assert "these are on cpu" in native.cuda_missing(CPU)


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(ValueError, match="instruction set 'avx9' is not one this processor has; choose from"):
        native.cpu().use("avx9")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.unscale([(0, F32)], [4], 8, 8, 1), "null address"),
        (lambda m: m.unscale([(64, 9)], [4], 8, 8, 1), "dtype that is not"),
        (lambda m: m.unscale([(64, F32)], [-4], 8, 8, 1), "negative"),
        (lambda m: m.unscale([(64, F32)], [4, 5], 8, 8, 1), "1 tensors for 2 sizes"),
        (lambda m: m.unscale([], [], 0, 0, 1), "must be given"),
        (lambda m: m.grad_stats([], [], 0, 1.0, 0, 1), "stats is null"),
        (
            lambda m: m.adamw(
                m.Update([], [], [], [], [8], 0, 0), [], [], [], m.AdamOptions(0.1, 0.9, 0.9, 1e-8, 0.0, 1, True), 1
            ),
            "differ in number",
        ),
        (
            lambda m: m.sgd(
                m.Update([(8, F32)], [], [7], [(8, F32)], [8], 0, 0), [1], [], m.SgdOptions(0.1, 0, 0, 0, False), 1
            ),
            "for bf16 parameters",
        ),
        (
            lambda m: m.sgd(
                m.Update([(8, F32)], [(8, F32)], [], [(8, F32)], [8], 0, 0),
                [1],
                [],
                m.SgdOptions(0.1, 0, 0, 0, False),
                1,
            ),
            "fp32 of 16-bit",
        ),
        (
            lambda m: m.sgd(
                m.Update([(8, F32)], [], [], [(8, F32)], [0], 0, 0), [1], [], m.SgdOptions(0.1, 0, 0, 0, False), 1
            ),
            "steps holds a null",
        ),
        (
            lambda m: m.rotate(8, 8, F32, [1, 1, 1, 8], [8, 8, 8, 2], [8, 8, 8, 1], 8, 8, 0, 8, False, 1),
            "last stride must be 1",
        ),
        (lambda m: m.rotate(8, 8, F32, [1, 1, 1, 8], [8, 8, 8, 1], [8, 8, 8, 1], 8, 8, 0, 10, False, 1), "at most D"),
        (lambda m: m.rotate(0, 8, F32, [1, 1, 1, 8], [8, 8, 8, 1], [8, 8, 8, 1], 8, 8, 0, 8, False, 1), "null"),
    ],
)
def test_launchers_check_what_they_are_given(call, message):
    with pytest.raises(ValueError, match=message):
        call(native.cpu())


def test_instruction_sets_share_no_code():
    """A weak symbol made by a file compiled for AVX-512 may be the copy the linker keeps for everyone."""
    objects = [p for p in (ROOT / "build").rglob("*.o") if re.search(r"\.(avx2|avx512\w*|amx)\.o$", p.name)]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of an in-place build, or no nm: run `python setup.py build_ext --inplace`")
    for path in objects:
        names = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        weak = [line for line in names.splitlines() if re.match(r"\S* *[WVu] ", line)]
        assert not weak, f"{path.name} defines {weak[:3]}"


def build(tmp_path: Path, **environment: str) -> Path:
    """A build of the package in a folder of its own; returns the folder to put on the path."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path / "base"),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True, text=True)
    return tmp_path / "lib"


def test_without_compilers_everything_runs_by_definition(tmp_path):
    lib = build(tmp_path, CC="/bin/false", CXX="/bin/false", CUDA_HOME="/nonexistent", CUDA_PATH="")
    report = json.loads((lib / "fastlm" / "build.json").read_text())
    assert not report["cpu"]["built"] and "no C++17 compiler that works (/bin/false)" in report["cpu"]["why"]
    assert not report["cuda"]["built"] and "nvcc was not found" in report["cuda"]["why"]
    code = """
import torch, fastlm
from fastlm.backends.dispatch import OPS
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
fastlm.optim.AdamW([p], max_grad_norm=1.0).step()
q = torch.randn(1, 2, 4, 8)
fastlm.attention(q, q, q, position=fastlm.positions.T5Bias(2), causal=True)
print(dict(OPS["adamw"].explain(torch.device("cpu")))["cpp"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(lib)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "no C++17 compiler that works" in done.stdout and "cure: install one" in done.stdout


def sanitized(tmp_path: Path, kind: str, library: str, select: str, **options: str) -> None:
    """Run the C++ tests chosen by `select` once more, on a build that looks for faults of this kind and stops at the
    first.

    That build has tiles of bf16 (AMX) in software, where the processor has the rest of what they need; those tests run
    on them too.
    """
    find = lambda name: subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    # the second so that the first finds what throws exceptions
    preload = [find(name) for name in (library, "libstdc++.so.6") if shutil.which("g++")]
    if not preload or not all(Path(path).is_absolute() for path in preload) or sys.platform != "linux":
        pytest.skip(f"GCC's {library} is not here: install g++ on Linux")
    compiler = shlex.join(["g++", "-include", str(ROOT / "tests" / "csrc" / "on_host" / "amx.h")])
    lib = build(tmp_path, FASTLM_SANITIZE=kind, CXX=compiler, CUDA_HOME="/nonexistent", CUDA_PATH="")
    environment = (
        os.environ
        | options
        | {"PYTHONPATH": os.pathsep.join((str(lib), str(ROOT / "tests" / "support"))), "LD_PRELOAD": " ".join(preload)}
    )
    suites = [
        str(ROOT / "tests" / name)
        for name in (
            "optim/test_optim.py",
            "ops/test_attention.py",
            "ops/test_attention_cpu.py",
            "ops/test_attention_threads.py",
        )
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "--rootdir",
        str(tmp_path),
        "-k",
        select,
        *suites,
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    select = "agree or launcher or strided or empty or grad_stats or unscale or rotate"
    select += " or (depend_on_threads and not bfloat16) or (amx and not torch.float32 and not torch.float16)"
    leaks = "detect_leaks=0"  # CPython itself keeps what it allocated at start
    sanitized(
        tmp_path,
        "address,undefined",
        "libasan.so",
        select,
        ASAN_OPTIONS=leaks,
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )


def test_clean_under_thread_sanitizer(tmp_path):
    """Two, three and seven threads in turn. PyTorch and its OpenMP were not built for this sanitizer, which cannot see
    how their threads wait for one another: what they call is left out, and the extension starts threads of its own
    (parallel.h).
    """
    theirs = [f"called_from_lib:{library}.so" for library in ("libtorch_cpu", "libtorch_python", "libgomp")]
    # the last: the C library, as their threads end
    (tmp_path / "theirs").write_text("\n".join([*theirs, "race:_dl_deallocate_tls"]))
    # Python's end trips over a lock of PyTorch
    options = f"halt_on_error=1:report_mutex_bugs=0:suppressions={tmp_path / 'theirs'}"
    sanitized(tmp_path, "thread", "libtsan.so", "depend_on_threads and not bfloat16", TSAN_OPTIONS=options)

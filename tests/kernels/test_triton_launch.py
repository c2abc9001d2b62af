"""Triton's launchers without a GPU: what they hand to the driver, by a driver of our own (launches.py,
on_host/libcuda.c).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton_compile import KERNELS, NO_TRITON_36, ROOT

TESTS = Path(__file__).parents[1]
# compiled apart: heads, and rows, that lie a multiple of 16 elements apart, for these are read 16 bytes at a time; and
# sums in fp32, where programs share the gradient of a bias
ROWS_OF_A_BIAS = {"bias of keys": 2, "bias": 4}


@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_the_driver_gets_what_kernels_are_given(version, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("no gcc, with which Triton builds its launcher: install gcc on Linux")
    path = [str(ROOT)]
    if version == "3.6":
        if "FASTLM_TRITON_36" not in os.environ:
            pytest.skip(NO_TRITON_36)
        path.insert(0, os.environ["FASTLM_TRITON_36"])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    where = [sys.executable, "-c", "import triton.backends.nvidia as n; print(n.__path__[0])"]
    backend = Path(subprocess.run(where, env=environment, check=True, capture_output=True, text=True).stdout.strip())
    library = [
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{backend / 'include'}",
        str(TESTS / "csrc" / "on_host" / "libcuda.c"),
    ]
    subprocess.run(["gcc", *library, "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")], check=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "support" / "launches.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    names, ragged = done.stdout.splitlines()
    assert {name.removesuffix("_kernel") for name in names.split()} == KERNELS
    # a model whose lengths, batches and heads change compiles each kernel once
    for term, compiled in json.loads(ragged).items():
        assert set(compiled) >= {"forward", "dq", "dkdv"}
        for kernel, times in compiled.items():
            assert times <= ROWS_OF_A_BIAS.get(term, 1), f"{term}: {kernel} is compiled {times} times"

"""Attention in C++ is as accurate as it must be beside the kernels that PyTorch has for lesser processors than this."""

import os
import subprocess
import sys

import pytest
import torch

from fastlm.backends import native

CODE = """
import torch
import fastlm
from cases import ATTENTION
from fastlm.backends import native
from tolerance import assert_case_accurate

print(torch.backends.cpu.get_cpu_capability())
with fastlm.use_backend(attention="cpp", attention_backward="cpp"):
    for case in ATTENTION:
        for isa in native.cpu().available():
            native.cpu().use(isa)
            try:
                assert_case_accurate(case, torch.float32, torch.device("cpu"))
            except AssertionError as error:
                raise AssertionError(f"{case} by {isa}: {error}") from error
"""
KINDS = {  # what ATen, oneDNN and MKL call them
    "avx2": dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    "default": dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_ENABLE_INSTRUCTIONS="SSE4_2"),
}
LESSER = {"AVX512": ["avx2", "default"], "AVX2": ["default"]}.get(torch.backends.cpu.get_cpu_capability(), [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", LESSER)
def test_attention_is_accurate(kind):
    if native.cpp_missing(torch.device("cpu")):
        pytest.skip(native.cpp_missing(torch.device("cpu")))
    environment = os.environ | KINDS[kind]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [kind.upper()]

"""The CUDA kernels of attention, compiled as C++ and run on the host: tensor cores, copies that go on beside them and
barriers in software, shared memory under watch (on_host/shared_memory.h).

What the host cannot show: how long anything takes, copies that really overtake one another, the memory model, and its
compiler's code. test_cuda_attention.py asks the same on a GPU, test_cuda_compile.py what the compiler made of it.
"""

import on_host
import pytest
import torch
from cases import ATTENTION
from tolerance import assert_case_accurate

import fastlm
from fastlm.backends import native
from fastlm.ops.attention import attention

CPU = torch.device("cpu")
NAMED = {case.name: case for case in ATTENTION}
CUDA = next(backend for backend in attention.backends if backend.name == "cuda")
SERVED = [case for case in ATTENTION if CUDA.refuses(case.make(torch.bfloat16, CPU)) is None]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return on_host.attention(tmp_path_factory.mktemp("on_host"))


@pytest.fixture
def use(monkeypatch):
    """use(module): attention by that module, on CPU tensors; results start as NaN."""
    monkeypatch.setattr(native, "cuda_missing", lambda device: None)
    monkeypatch.setattr(native, "cuda_stream", lambda device: (0, 0))
    torch.use_deterministic_algorithms(True, warn_only=True)
    with fastlm.use_backend(attention="cuda", attention_backward="cuda"):
        yield lambda module: monkeypatch.setattr(native, "cuda", lambda: module)
    torch.use_deterministic_algorithms(False)


def test_most_cases_are_served():
    assert {"t5_causal", "kerple_gqa", "window", "offset", "prefix", "packed", "lengths"} <= {c.name for c in SERVED}


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_is_accurate(built, use, case, dtype):
    use(built)
    assert_case_accurate(case, dtype, CPU)

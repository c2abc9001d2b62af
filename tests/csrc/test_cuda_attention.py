"""Attention by CUDA C++ on a GPU: what test_cuda_attention_on_host.py asks of its sources on the host."""

import pytest
import torch
from cases import ATTENTION, COMBINED, _attention
from tolerance import assert_attention_accurate, assert_case_accurate, assert_repeats

import fastlm
from fastlm.backends import native
from fastlm.ops.attention import attention

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no GPU, or a CPU build of torch"
)

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
SERVES = next(backend for backend in attention.backends if backend.name == "cuda")
SERVED = [case for case in (*ATTENTION, *COMBINED) if SERVES.refuses(case.make(torch.bfloat16, CPU)) is None]


@pytest.fixture(autouse=True)
def cuda_backend():
    missing = native.cuda_missing(CUDA)
    if missing:
        pytest.fail(missing)
    torch.use_deterministic_algorithms(True, warn_only=True)  # results start as NaN
    with fastlm.use_backend(attention="cuda", attention_backward="cuda"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_attention_is_accurate(case, dtype):
    assert_case_accurate(case, dtype, CUDA)


@pytest.mark.parametrize("D", [64, 80, 96, 128])
def test_many_tiles(D):
    args = _attention(B=2, H=4, Hk=2, Lq=1000, Lk=1000, D=D, scheme="t5", causal=True)(torch.bfloat16, CUDA)
    assert_attention_accurate(args)
    assert_repeats(args)

"""Triton's norms: on the GPU if there is one, compiled; else in Triton's interpreter (tests/conftest.py says so)."""

import pytest
import torch
from cases import NORM
from normed import assert_norm_accurate, results

import fastlm
from fastlm.backends import native
from fastlm.backends.dispatch import OPS

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def by_triton(poisoned_outputs):
    with fastlm.use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", NORM, ids=str)
def test_it_is_as_accurate_as_pytorch(case, dtype):
    assert_norm_accurate(case, dtype, DEVICE)


def test_the_same_bits_every_time():
    case = next(case for case in NORM if case.name == "many_rows")
    a = case.make(torch.float32, DEVICE)
    first = results(OPS[case.op], a)
    for _ in range(2 if native.interpreting() else 20):
        for key, x in results(OPS[case.op], a).items():
            assert torch.equal(x, first[key]), key


def test_long_rows_are_refused():
    a = NORM[0].make(torch.float32, DEVICE)._replace(x=torch.ones(2, 16385, device=DEVICE), weight=None)
    with pytest.raises(fastlm.BackendError, match="of at most 16384 elements"):
        OPS[NORM[0].op](a)

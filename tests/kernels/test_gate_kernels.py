"""Triton's gates: on the GPU if there is one, compiled; else in Triton's interpreter (tests/conftest.py says so)."""

import pytest
import torch
from cases import GATE
from gated import assert_gate_accurate

import fastlm

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in GATE if case.op == "gated"], ids=str)
def test_it_is_as_accurate_as_pytorch(case, dtype):
    with fastlm.use_backend("triton"):
        assert_gate_accurate(case, dtype, DEVICE)

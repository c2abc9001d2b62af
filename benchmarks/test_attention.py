"""Attention on a CPU, under every scheme that acts inside attention, against PyTorch's ways to the same result."""

import attention
import pytest
import torch
from shapes import Attention

from fastlm import positions

CPU = torch.device("cpu")
# those two are added to embeddings
INSIDE = [name for name in sorted(positions.SCHEMES) if name not in ("learned", "sinusoidal")]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("L", [512, 1024, 2048])
@pytest.mark.parametrize("scheme", INSIDE)
def test_attention(scheme, L, direction, smoke, limits, record):
    problem = (
        Attention(scheme, B=1, H=2, L=L // 32, D=16, dtype=torch.float32)
        if smoke
        else Attention(scheme, 1, 12, L, 64, torch.float32)
    )
    x = attention.make_inputs(problem, CPU)
    attention.check(x, gradients=direction == "both")
    field = attention.contestants(x)
    row = attention.measure(x, field, direction, "clock", **limits)
    record(row, field["fastlm"]().call(direction, x.grad))

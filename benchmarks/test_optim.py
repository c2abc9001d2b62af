"""Adafactor, LAMB, SGD and bf16 AdamW on a CPU at GPT-2's parameter shapes."""

import optim
import pytest
import torch
from shapes import PARAMETERS, SMOKE_PARAMETERS

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", optim.STEPS)
def test_optim(kind, smoke, limits, copy, record):
    name, shapes = next(iter((SMOKE_PARAMETERS if smoke else PARAMETERS).items()))
    optim.check(shapes, kind, CPU)
    row = optim.measure(name, shapes, kind, "clock", CPU, copy, **limits)
    record(row, optim.contestants(shapes, kind, CPU)["fastlm"]()[0])

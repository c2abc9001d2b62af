"""Adafactor, LAMB and bf16 AdamW on a CPU at GPT-2's parameter shapes."""

import optim
import pytest
from shapes import PARAMETERS, SMOKE_PARAMETERS


@pytest.mark.parametrize("kind", optim.STEPS)
def test_optim(kind, smoke, limits, copy, record):
    name, shapes = next(iter((SMOKE_PARAMETERS if smoke else PARAMETERS).items()))
    optim.check(shapes, kind)
    row = optim.measure(name, shapes, kind, copy, **limits)
    record(row, optim.contestants(shapes, kind)["fastlm"]()[0])

"""AdamW on a CPU at GPT-2's parameter shapes: the bare step, and the chain of a mixed-precision loop."""

import adamw
import pytest
import torch
from shapes import PARAMETERS, SMOKE_PARAMETERS

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["bare", "chain"])
def test_adamw(kind, smoke, limits, copy, record):
    name, shapes = next(iter((SMOKE_PARAMETERS if smoke else PARAMETERS).items()))
    adamw.check(shapes, kind, CPU)
    row = adamw.measure(name, shapes, kind, "clock", CPU, copy, **limits)
    record(row, adamw.contestants(shapes, kind, CPU)["fastlm"]()[0])

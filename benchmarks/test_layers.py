"""What stands between matrix products, on a CPU: norms, gates, the loss of a large vocabulary; forward and backward."""

import layers
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", layers.LAYERS)
def test_layer(name, dtype, smoke, limits, copy, record):
    record(*layers.measure(name, dtype, "clock", copy, 32 if smoke else 1, **limits))


@pytest.mark.parametrize("V", [32000, 50257])
def test_loss(V, smoke, limits, matmul, record):
    N, V, D = (64, 320, 24) if smoke else (4096, V, 768)
    record(*layers.measure_loss(N, V, D, "clock", matmul(torch.float32), **limits))

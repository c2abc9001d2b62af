"""What stands between matrix products, on a CPU and both ways: norms, gates, embeddings, the loss of many words."""

import cross_entropy
import layers
import pytest
import torch
from shapes import Loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", layers.LAYERS)
def test_layer(name, dtype, smoke, limits, copy, record):
    record(*layers.measure(name, dtype, "clock", copy, 32 if smoke else 1, **limits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("V", [32000, 50257])
def test_embedding(V, dtype, smoke, limits, copy, record):
    N, V, D = (64, 320, 24) if smoke else (8192, V, 768)
    record(*layers.measure_embedding(N, V, D, dtype, "clock", copy, **limits))


@pytest.mark.parametrize("targets", [1.0, 0.15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("V", [32000, 50257])
def test_loss(V, dtype, targets, smoke, limits, matmul, record):
    N, V, D = (64, 320, 24) if smoke else (4096, V, 768)
    x = cross_entropy.Inputs(Loss(N, V, D, dtype, targets), torch.device("cpu"))
    cross_entropy.check(x)
    record(cross_entropy.measure(x, "clock", matmul(dtype), **limits), cross_entropy.contestants(x)["fastlm"]())

"""Whole models on a CPU against transformers': a training step, its memory, a whole update, decoding with a cache."""

import decoding
import models
import pytest
import torch
import updates


@pytest.mark.parametrize("L", [512, 1024])
@pytest.mark.parametrize("name", models.MODELS)
def test_training(name, L, smoke, limits, layers, record):
    L = L // 32 if smoke else L
    row = models.measure(name, L, smoke=smoke, layers=layers, **limits)
    ours = models.from_huggingface(models.theirs(name, smoke=smoke, layers=layers)).train()
    record(row, models.step(name, L, models.OURS, ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", updates.MODELS)
def test_update(name, dtype, smoke, limits, record):
    L = 16 if smoke else 512
    row = updates.measure(name, L, dtype, smoke=smoke, **limits)
    ours = models.from_huggingface(models.theirs(name, smoke=smoke)).train()
    record(row, updates.update(name, L, dtype, models.OURS, ours))


@pytest.mark.parametrize("B", [1, 8])
def test_decoding(B, smoke, limits, layers, record):
    row = decoding.measure(B, smoke=smoke, layers=layers, **limits)
    record(row, decoding.writers(B, row["written"], smoke=smoke, layers=layers)[models.OURS])

"""Whole models on a CPU against transformers': a training step, its memory, and decoding with a cache."""

import models
import pytest


@pytest.mark.parametrize("L", [512, 1024])
@pytest.mark.parametrize("name", models.MODELS)
def test_training(name, L, smoke, limits, layers, record):
    L = L // 32 if smoke else L
    row = models.measure(name, L, smoke=smoke, layers=layers, **limits)
    ours = models.from_huggingface(models.theirs(name, smoke=smoke, layers=layers)).train()
    record(row, models.step(name, L, models.OURS, ours))


@pytest.mark.parametrize("B", [1, 8])
def test_decoding(B, smoke, limits, layers, record):
    row = models.measure_decoding(B, smoke=smoke, layers=layers, **limits)
    record(row, models.writers(B, row["written"], smoke=smoke, layers=layers)[models.OURS])

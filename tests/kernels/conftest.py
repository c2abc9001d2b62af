"""Fixtures of tests that run Triton's kernels."""

import pytest
import torch


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Fresh memory is NaN, so that an element nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)

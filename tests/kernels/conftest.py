"""Fixtures of tests that run Triton's kernels."""

import importlib.util

import pytest
import torch

from fastlm.backends import native

if importlib.util.find_spec("triton") is not None and native.interpreting():
    import interpreting

    interpreting.patch_once()


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Fresh memory is NaN, so that an element nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)

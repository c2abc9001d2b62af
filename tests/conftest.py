"""Fixtures that several test files use; which fastlm the tests' own processes import; where Triton's kernels run."""

import os
from pathlib import Path

import pytest
import torch
from runs import text

import fastlm

os.environ["PYTHONPATH"] = str(Path(fastlm.__file__).parents[1])  # the package under test, be it installed or a checkout
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's interpreter; before anything imports a kernel

__all__ = ["text"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Python looks in the working directory first, and a checkout there may not be built."""
    monkeypatch.chdir(tmp_path)

"""Fixtures that several test files use, and where Triton's kernels run: on the GPU if there is one, else in Triton's interpreter."""

import os

import torch
from runs import text

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel

__all__ = ["text"]

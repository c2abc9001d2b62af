"""A linear layer of few rows, such as of one token that is written: y = x weightᵀ + bias.

It takes as long as the weight takes to be read, once, by all threads. Matrix libraries give a product of one row to one
thread (benchmarks/FACTS.md).

    x [..., K]  weight [N, K]  bias [N]          y [..., N], all of one dtype; sums are fp32 (fp64 for fp64)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import op

FEW = 8  # rows at most: csrc/cpu/kernels.h


@op
def linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, without a gradient."""
    return F.linear(x, weight, bias)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype not in native.DTYPES:
        return f"x is {x.dtype}; served are fp32, bf16 and fp16"
    rows = x.shape[:-1].numel()
    return f"x has {rows} rows; served are {FEW}" if rows > FEW else None


@linear_of_few_rows.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    rows, K = x.shape[:-1].numel(), x.shape[-1]
    native.cpu().linear(native.named(x=x, weight=weight, bias=bias, y=y), rows, K, len(weight), torch.get_num_threads())
    return y

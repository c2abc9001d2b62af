"""What every op over lists of tensors shares: how tensors are laid out for the C++ and CUDA launchers.

Elementwise rules do not care about shape, only that a parameter and its gradient and states keep their elements in one
order without gaps. Tensors that already do are passed as they are; others are copied to that layout and back.
"""

import torch
from torch import Tensor

from fastlm.native import DTYPES


def refuses_lists(**lists: list[Tensor]) -> str | None:
    """The first tensor no launcher can take, in words, or None."""
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if t.layout != torch.strided:
                return f"{name}[{i}] has layout {t.layout}; only dense (strided) tensors are served"
            if t.dtype not in DTYPES:
                return f"{name}[{i}] is {t.dtype}; served are fp32, bf16 and fp16"
            if t.device != tensors[0].device:
                return f"{name}[{i}] is on {t.device} and {name}[0] on {tensors[0].device}; call once per device"
    return None


def dense_like(x: Tensor, like: Tensor) -> Tensor:
    """x itself if it is dense and in `like`'s element order, else a copy that is."""
    if like is x:
        return x if _dense(x) else x.contiguous()
    if x.stride() == like.stride() or x.numel() <= 1:
        return x
    return x.new_empty_strided(like.shape, like.stride()).copy_(x)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def write_back(originals: list[Tensor], dense: list[Tensor]) -> None:
    """Copy results into the tensors that `dense_like` had to lay out anew."""
    for original, laid_out in zip(originals, dense, strict=True):
        if original is not laid_out:
            original.copy_(laid_out)


def cpp_list(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """(address, dtype number) of each tensor, as the launchers take them."""
    return [(t.data_ptr(), DTYPES[t.dtype]) for t in tensors]

"""Selective recomputation: an activation that costs one pass is computed again when a gradient asks for it, instead of
being kept from the forward pass (Korthikanti et al. 2022, sec. 5).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastlm.backends.eager import observed, transformed


def recomputed(y: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager:
    """A context in which operators that want y for their gradients, or a view of it, keep `make` in its place.

    y is kept as ever where somebody else decides what is: compilers, torch.func, and who has hooks on saved tensors, as
    torch.utils.checkpoint and save_on_cpu have.

    Args:
        y: a tensor with memory of its own.
        make: gives y's values once more, in a new tensor of y's strides.
    """
    if not torch.is_grad_enabled() or _others_decide(y):
        return nullcontext()
    memory = y.untyped_storage().data_ptr()

    def pack(x: Tensor) -> "_View | _Kept":
        if x.untyped_storage().data_ptr() == memory:
            return _View(x.shape, x.stride(), x.storage_offset())
        return _Kept(x, x._version)

    def unpack(packed: "_View | _Kept") -> Tensor:
        if isinstance(packed, _View):
            with torch.no_grad():
                return make().as_strided(*packed)
        x, version = packed
        if x._version != version:
            raise RuntimeError(
                f"a tensor {list(x.shape)} that a gradient needs was changed in place after the forward pass (it is at "
                f"version {x._version}, and was at {version}); change it after backward, or a clone of it"
            )
        return x

    return saved_tensors_hooks(pack, unpack)


class _View(NamedTuple):
    """A view of what is made again: the arguments of as_strided."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class _Kept(NamedTuple):
    """Any other tensor. PyTorch leaves it to hooks to notice that one was changed."""

    x: Tensor
    version: int


def _others_decide(y: Tensor) -> bool:
    return (
        observed((y,))  # first, for compilers look on that do not know what follows
        or transformed()
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )

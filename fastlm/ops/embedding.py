"""Rows of a learned table by token, and their gradient, which is sorted by token and never queues.

    y_i = weight[ids_i]                    dweight[v] = Σ dy_i over all i with ids_i = v, in their order

PyTorch adds rows of 16 bits in 16 bits; the sums here are fp32 (fp64 for fp64 weight), each row's by one thread or
program, so that bits are the same at every run and thread count. Taking rows is a copy, which PyTorch's own makes as
fast as memory allows.

    ids [...] int64        weight [V, D]        y [..., D], in weight's dtype
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backends import native, pages
from fastlm.backends.dispatch import BackendError, op

NO_PADDING = -1

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op
def embedding(ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """weight[ids]. padding_idx: the row that has no gradient, or NO_PADDING."""
    return F.embedding(ids, weight)


@op(gradient_of=embedding)
def embedding_backward(dy: Tensor, ids: Tensor, words: int, padding_idx: int) -> Tensor:
    """The gradient of weight [words, D], in dy's dtype; 0 at padding_idx."""
    rows, (at, order) = dy.reshape(-1, dy.shape[-1]), ids.flatten().sort(stable=True)
    begins = torch.searchsorted(at, torch.arange(words + 1, device=at.device))
    wide = rows[order].to(torch.promote_types(dy.dtype, torch.float32))
    sums = torch.segment_reduce(wide, "sum", lengths=begins.diff(), unsafe=True)
    if padding_idx != NO_PADDING:
        sums[padding_idx] = 0
    return sums.to(dy.dtype)


# counts of words are known only where ids are, which fake tensors have not
embedding_backward.torch_op.register_fake(lambda dy, ids, words, padding_idx: dy.new_empty(words, dy.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Backends: PyTorch's own where it is faster and as exact, and in fp64


def _torch_is_slower(ids: Tensor, weight: Tensor, padding_idx: int) -> bool:
    """But for tables of fp32 that memory is kept for, by a sweep in benchmarks/FACTS.md."""
    if weight.dtype == torch.float64:
        return False
    return ids.device.type != "cpu" or (native.cpp_is_built() and gains(weight))


def gains(weight: Tensor) -> bool:
    """Whether the gradient of such a table is summed faster, or more exactly, than by PyTorch on a CPU."""
    return weight.dtype.itemsize < 4 or weight.nbytes >= pages.LARGE


@embedding.backend("torch", devices=("cpu", "cuda"), slower_than_next=_torch_is_slower, differentiable=True)
def _(ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    return F.embedding(ids, weight, None if padding_idx == NO_PADDING else padding_idx)


def _refuses(*args) -> str | None:
    rows = next(x for x in args if x.is_floating_point())
    return None if rows.dtype in native.DTYPES else f"weight is {rows.dtype}; served are fp32, bf16 and fp16"


on_gpu = dict(devices=("cuda",), unavailable=native.triton_missing, refuses=_refuses)
on_cpu = dict(devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)
# both take rows by PyTorch's copy, and differ in the gradient
embedding.backend("triton", **on_gpu)(embedding.definition)
embedding.backend("cpp", **on_cpu)(embedding.definition)


@embedding_backward.backend("triton", **on_gpu)
def _(dy: Tensor, ids: Tensor, words: int, padding_idx: int) -> Tensor:
    from fastlm.kernels.embedding import backward

    return backward(dy, ids, words, padding_idx)


@embedding_backward.backend("cpp", **on_cpu)
def _(dy: Tensor, ids: Tensor, words: int, padding_idx: int) -> Tensor:
    dy, ids, dweight = dy.contiguous(), ids.contiguous(), pages.zeros(words, dy.shape[-1], like=dy)
    native.cpu().embedding_backward(
        native.named(dy=dy, dweight=dweight), ids.data_ptr(), ids.numel(), words, dy.shape[-1], padding_idx,
        torch.get_num_threads(),
    )  # fmt: skip
    return dweight


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


def _save(ctx, inputs, output):
    ids, weight, ctx.padding_idx = inputs
    ctx.words = len(weight)
    ctx.save_for_backward(ids)


@embedding.gradient(save=_save)
def _(ctx, dy):
    return None, embedding_backward(dy, *ctx.saved_tensors, ctx.words, ctx.padding_idx), None


@embedding_backward.gradient(save=lambda ctx, inputs, output: None)
def _(ctx, grad):
    raise BackendError('embedding is differentiable once, and more often under fastlm.use_backend(embedding="torch")')

"""Attention with a distance table and positional masks.

    score[b, h, i, j] = scale · ⟨q[b, h, i], k[b, h, j]⟩ + table[h, j - i + Lq - 1]
    out = softmax over visible j of score, times v

The table holds one number for each head and each distance d = j - (i + offset), so a T5 bias, ALiBi, KERPLE or any
learned function of distance costs O(L) memory. A row with no visible key gives zeros, and zero gradients.
Shapes: q [B, H, Lq, D]; k, v [B, Hk, Lk, D]; table [H, Lq + Lk - 1] fp32; key_lengths [B] int; lse [B, H, Lq] fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import native
from fastlm.dispatch import op
from fastlm.masks import UNBOUNDED

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op
def attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, key_lengths: Tensor | None,
    left: int, right: int, scale: float, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out [B, H, Lq, D] in q's dtype, lse [B, H, Lq]): the file's formula, in fp32 (fp64 for fp64 inputs).

    lse is the natural logarithm of Σ exp(score) over visible keys, -inf where there is none.
    """
    score = _scores(q, k, table, key_lengths, left, right, scale, offset)
    lse = score.logsumexp(-1)
    p = _probabilities(score, lse)
    out = p @ _per_query_head(v, q).to(p.dtype)
    return out.to(q.dtype), lse


@op
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, key_lengths: Tensor | None,
    out: Tensor, lse: Tensor, left: int, right: int, scale: float, offset: int, table_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv, dtable) for grad = dL/dout.

    With P the probabilities and δ[i] = ⟨grad[i], out[i]⟩: dv = Pᵀ grad; dS = P ∘ (grad vᵀ - δ); dq = scale · dS k;
    dk = scale · dSᵀ q; dtable[h, d] = Σ over b and all (i, j) at distance d of dS. dtable is empty unless table_grad.
    """
    p = _probabilities(_scores(q, k, table, key_lengths, left, right, scale, offset), lse)
    wide = p.dtype
    grad, out, q_, k_, v_ = (x.to(wide) for x in (grad, out, q, _per_query_head(k, q), _per_query_head(v, q)))
    ds = p * (grad @ v_.mT - (grad * out).sum(-1, keepdim=True))
    dq = scale * (ds @ k_)
    dk = scale * (ds.mT @ q_)
    dv = p.mT @ grad
    dtable = _sum_by_distance(ds.sum(0)) if table_grad else lse.new_empty(0)
    dk, dv = (g.unflatten(1, (k.shape[1], -1)).sum(2) for g in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtable


def _scores(q, k, table, key_lengths, left, right, scale, offset):
    wide = torch.promote_types(q.dtype, torch.float32)
    score = scale * (q.to(wide) @ _per_query_head(k, q).to(wide).mT)
    Lq, Lk = score.shape[-2:]
    if table is not None:
        # unfold gives [h, s, j] = table[h, s + j]; row i needs s = Lq - 1 - i
        score = score + table.to(wide).unfold(-1, Lk, 1).flip(-2)
    j = torch.arange(Lk, device=q.device)
    d = j - (torch.arange(Lq, device=q.device)[:, None] + offset)
    visible = (d >= -left) & (d <= right)
    if key_lengths is not None:
        visible = visible & (j < key_lengths[:, None, None, None])
    return score.masked_fill(~visible, -torch.inf)


def _probabilities(score, lse):
    """softmax from the log-sum-exp; a row with no visible key is all zeros instead of NaN."""
    return torch.exp(score - lse.masked_fill(lse == -torch.inf, 0.0)[..., None].to(score.dtype))


def _per_query_head(kv, q):
    """Repeat each key/value head for the group of query heads that share it (grouped-query attention)."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _sum_by_distance(ds):
    """[H, Lq, Lk] → [H, Lq + Lk - 1]: sum each diagonal. Padding every row by Lq and re-reading the buffer with rows
    one shorter shifts row i right by i, which turns diagonals into columns: a fixed-order sum, no scatter."""
    H, Lq, Lk = ds.shape
    width = Lq + Lk - 1
    return F.pad(ds.flip(1), (0, Lq)).flatten(1)[:, : Lq * width].unflatten(1, (Lq, width)).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _sdpa_refuses(q, k, v, table, key_lengths, left, right, scale, offset):
    if table is not None:
        return "scaled_dot_product_attention takes a distance table only as an L×L tensor"
    if key_lengths is not None:
        return "scaled_dot_product_attention takes key lengths only as a mask tensor"
    if (left, right) != (UNBOUNDED, UNBOUNDED) and not ((left, right) == (UNBOUNDED, 0) and offset == 0 and q.shape[2] == k.shape[2]):
        return "scaled_dot_product_attention knows no mask, or causal with as many queries as keys"
    return None


@attention.backend("sdpa", devices=("cpu", "cuda"), refuses=_sdpa_refuses, differentiable=True)
def _(q, k, v, table, key_lengths, left, right, scale, offset):
    """PyTorch's own kernels (cuDNN, FlashAttention, CPU flash), which serve plain attention well. No lse."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=right == 0, scale=scale, enable_gqa=grouped), None


def _cpp_refuses(q, k, v, table, key_lengths, left, right, scale, offset):
    if q.dtype not in native.DTYPES:
        return f"query is {q.dtype}; served are fp32, bf16 and fp16"
    if not 1 <= q.shape[3] <= 256:
        return f"the head dimension is {q.shape[3]}; served are 1 to 256"
    if left + right < 0:
        return f"the band from -{left} to {right} is empty"
    return None


def _cpp_backward_refuses(grad, q, k, v, table, key_lengths, out, lse, left, right, scale, offset, table_grad):
    return _cpp_refuses(q, k, v, table, key_lengths, left, right, scale, offset)


@attention.backend("cpp", devices=("cpu",), missing=native.cpp_missing, refuses=_cpp_refuses)
def _(q, k, v, table, key_lengths, left, right, scale, offset):
    q, k, v, table, key_lengths = _for_cpp(q, k, v, table, key_lengths)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    native.cpu().attention(
        *map(native.view, (q, k, v)), native.DTYPES[q.dtype], native.address(table), native.address(key_lengths),
        (left, right, offset), scale, out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


@attention_backward.backend("cpp", devices=("cpu",), missing=native.cpp_missing, refuses=_cpp_backward_refuses)
def _(grad, q, k, v, table, key_lengths, out, lse, left, right, scale, offset, table_grad):
    q, k, v, table, key_lengths = _for_cpp(q, k, v, table, key_lengths)
    grad, out, lse = native.side_by_side(grad), out.contiguous(), lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dtable = lse.new_empty(q.shape[1], q.shape[2] + k.shape[2] - 1) if table_grad else None
    native.cpu().attention_backward(
        *map(native.view, (grad, q, k, v)), native.DTYPES[q.dtype], native.address(table), native.address(key_lengths),
        (left, right, offset), scale, out.data_ptr(), lse.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
        native.address(dtable), torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv, lse.new_empty(0) if dtable is None else dtable


def _for_cpp(q, k, v, table, key_lengths):
    table = None if table is None else table.float().contiguous()
    key_lengths = None if key_lengths is None else key_lengths.long().contiguous()
    return *map(native.side_by_side, (q, k, v)), table, key_lengths


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


def _save(ctx, inputs, output):
    q, k, v, table, key_lengths, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, table, key_lengths, *output)
    ctx.mark_non_differentiable(output[1])


@attention.gradient(save=_save)
def _(ctx, grad, grad_lse):
    table_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dtable = attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.scalars, table_grad)
    return dq, dk, dv, dtable if table_grad else None, None, None, None, None, None

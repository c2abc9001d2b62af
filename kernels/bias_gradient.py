"""Gradient of a given bias, Σ dS over what it is broadcast over, in a fixed order.

Where it has an element for each query and key, a program owns a tile of it and walks rows of the batch and heads; few
tiles are shared by several programs, each of which walks a part. Where it has one for all keys of a query, or all
queries of a key, walks of attention_backward.py leave the sum of each row. What is left, a sum of few tensors, is
PyTorch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Saved, launch, numbers, tiles_for, with_bounds
from fastlm.kernels.masks import key_count, tiles_of_keys
from fastlm.kernels.terms import (
    UNSPECIALIZED,
    Head,
    Numbers,
    TermPointers,
    probabilities,
    probability_gradient,
    scores,
)
from fastlm.kernels.tile import cast, fma, head_of, load_position, load_rows, load_vector
from fastlm.kernels.tiles import block_d, cdiv

ENOUGH = 1024  # programs, which fill a GPU several times

# ---------------------------------------------------------------------------------------------------------------------
# Kernel


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "walked_b", "walked_h", "splits"])
def bias_kernel(
    q_rows, k_rows, v_rows, grad_rows, p_lse, p_delta, p_out, t,
    H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale,
    walked_b, walked_h, splits,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [splits, *bias.shape] = Σ dS of each share of what the bias is broadcast over: rows of the batch and heads,
    of which there are walked_b and walked_h for each of its own.
    """
    n = Numbers(
        H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale
    )
    # the tile of the gradient that this program owns, and its share of the walk
    n_i, n_j, n_h = tl.cdiv(Lq, BLOCK_M), tl.cdiv(Lk, BLOCK_N), H // walked_h
    split, i_bh = tl.program_id(0) % splits, tl.program_id(0) // (splits * n_j * n_i)
    j_tile, i_tile = tl.program_id(0) // splits % n_j, tl.program_id(0) // (splits * n_j) % n_i
    i_h, i_b = i_bh % n_h, i_bh // n_h
    i0, j0 = i_tile * BLOCK_M, j_tile * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split, walked_b * walked_h, splits):
        b, h = tl.cast(i_b + step // walked_h, tl.int64), tl.cast(i_h + step % walked_h, tl.int64)
        head, i_row = Head(b, h, key_count(t, b, Lk), None), (b * H + h) * Lq
        # where some of these queries see some of these keys
        begin, _, _, end = tiles_of_keys(t, head, i0, n, BLOCK_M, BLOCK_N)
        if (begin <= j_tile) & (j_tile < end):
            q = load_rows(head_of(q_rows, b, h), i0, Lq, D, BLOCK_M, BLOCK_D, True)
            query_positions = None if t.q_position is None else head_of(t.q_position, b, h)
            q_position = load_position(query_positions, q, i0, Lq, D, BLOCK_M, BLOCK_D, True)
            grad = load_rows(head_of(grad_rows, b, h), i0, Lq, D, BLOCK_M, BLOCK_D, True)
            lse = load_vector(p_lse + i_row, i0, Lq, BLOCK_M, float("inf"), True)
            delta = load_vector(p_delta + i_row, i0, Lq, BLOCK_M, 0.0, True)
            k = load_rows(head_of(k_rows, b, h // group), j0, head.n_keys, D, BLOCK_N, BLOCK_D, True)
            v = load_rows(head_of(v_rows, b, h // group), j0, head.n_keys, D, BLOCK_N, BLOCK_D, True)
            key_positions = None if t.k_position is None else head_of(t.k_position, b, h // group)
            k_position = load_position(key_positions, k, j0, head.n_keys, D, BLOCK_N, BLOCK_D, True)
            # dS = P ∘ (dP - δ), as for dq
            x, _slope = scores(
                q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, True, False
            )  # fmt: skip
            p = probabilities(x, lse[:, None], q.dtype, n)
            dp = probability_gradient(grad, v, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False)
            acc = fma(p, dp - delta[:, None], acc)
    i, j = i0 + tl.arange(0, BLOCK_M)[:, None], j0 + tl.arange(0, BLOCK_N)[None, :]
    n_bh = tl.num_programs(0) // (splits * n_j * n_i)
    p_out += (split * n_bh + i_bh).to(tl.int64) * Lq * Lk
    tl.store(p_out + i.to(tl.int64) * Lk + j, cast(acc, p_out.dtype.element_ty), mask=(i < Lq) & (j < Lk))


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def sums_of_rows(a: tuple, wanted: set[str]) -> tuple[Tensor | None, Tensor | None]:
    """Where Σ dS of each query [B, H, Lq, 1] or of each key [B, H, 1, Lk] is left, if a bias has one element for such a
    row and its gradient is wanted.
    """
    (B, H, Lq, _), Lk = a.q.shape, a.k.shape[2]
    if "bias" not in wanted or 1 not in a.bias.shape[2:]:
        return None, None
    of_queries = a.bias.shape[3] == 1
    sums = a.q.new_empty((B, H, Lq, 1) if of_queries else (B, H, 1, Lk), dtype=torch.float32)
    return (sums, None) if of_queries else (None, sums)


def bias_gradient(s: Saved, row_sums: Tensor | None, t: TermPointers, a: tuple, seen: tuple) -> Tensor:
    """Σ dS over what the bias is broadcast over, in the bias's shape. row_sums: of `sums_of_rows`; seen: the call's
    signature.
    """
    if row_sums is not None:
        return row_sums.sum_to_size(a.bias.shape)
    (B, H, Lq, D), Lk = a.q.shape, a.k.shape[2]
    chosen = tiles_for("bias", a)
    of_batch, of_heads = a.bias.shape[:2]
    walked_b, walked_h = B // max(of_batch, 1), H // max(of_heads, 1)
    programs = of_batch * of_heads * cdiv(Lq, chosen.BLOCK_M) * cdiv(Lk, chosen.BLOCK_N)
    splits = max(1, min(walked_b * walked_h, ENOUGH // max(programs, 1)))
    out = a.bias.new_empty(splits, *a.bias.shape, dtype=a.bias.dtype if splits == 1 else torch.float32)
    launch(
        bias_kernel, programs * splits, chosen, (*seen, splits == 1),
        *s, out, with_bounds(t, chosen), *numbers(a), walked_b, walked_h, splits,
        D, chosen.BLOCK_M, chosen.BLOCK_N, block_d(D),
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)

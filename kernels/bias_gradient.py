"""Gradient of a given bias: a program owns a tile of it, and walks all that the bias is broadcast over, in a fixed
order.
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

# ---------------------------------------------------------------------------------------------------------------------
# Kernel


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "walked_b", "walked_h"])
def bias_kernel(
    q_rows, k_rows, v_rows, grad_rows, p_lse, p_delta, p_out, t,
    H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale,
    walked_b, walked_h, OVER_Q: tl.constexpr, OVER_K: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out, of the bias's shape, = Σ dS over what it is broadcast over: rows of the batch and heads, of which there are
    walked_b and walked_h for each of its own; OVER_Q queries, OVER_K keys.
    """
    n = Numbers(
        H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale
    )
    # the tile of the gradient that this program owns
    n_i, n_j, n_h = 1 if OVER_Q else tl.cdiv(Lq, BLOCK_M), 1 if OVER_K else tl.cdiv(Lk, BLOCK_N), H // walked_h
    i_tile, j_tile = tl.program_id(0) // n_j % n_i, tl.program_id(0) % n_j
    i_h, i_b = tl.program_id(0) // (n_j * n_i) % n_h, tl.program_id(0) // (n_j * n_i * n_h)
    # every row of the batch, head, tile of queries and of keys that it is broadcast over
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(walked_b * walked_h):
        b, h = tl.cast(i_b + step // walked_h, tl.int64), tl.cast(i_h + step % walked_h, tl.int64)
        head, i_row = Head(b, h, key_count(t, b, Lk)), (b * H + h) * Lq
        for i_walk in range(0 if OVER_Q else i_tile, tl.cdiv(Lq, BLOCK_M) if OVER_Q else i_tile + 1):
            i0 = i_walk * BLOCK_M
            q = load_rows(head_of(q_rows, b, h), i0, Lq, D, BLOCK_M, BLOCK_D, True)
            query_positions = None if t.q_position is None else head_of(t.q_position, b, h)
            q_position = load_position(query_positions, q, i0, Lq, D, BLOCK_M, BLOCK_D, True)
            grad = load_rows(head_of(grad_rows, b, h), i0, Lq, D, BLOCK_M, BLOCK_D, True)
            lse = load_vector(p_lse + i_row, i0, Lq, BLOCK_M, float("inf"), True)
            delta = load_vector(p_delta + i_row, i0, Lq, BLOCK_M, 0.0, True)
            # of the tiles of keys those that these queries see, or if it is one of them this program's own
            begin, _, _, end = tiles_of_keys(t, head, i0, n, BLOCK_M, BLOCK_N)
            if not OVER_K:
                begin, end = tl.maximum(begin, j_tile), tl.minimum(end, j_tile + 1)
            for j_walk in range(begin, end):
                j0 = j_walk * BLOCK_N
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
    # summed over what is broadcast within the tile, too
    o_i, o_j, n_rows, n_columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], Lq, Lk
    if OVER_Q:
        acc, o_i, n_rows = tl.sum(acc, 0, keep_dims=True), tl.zeros([1, 1], tl.int32), 1
    if OVER_K:
        acc, o_j, n_columns = tl.sum(acc, 1, keep_dims=True), tl.zeros([1, 1], tl.int32), 1
    i, j = i_tile * BLOCK_M + o_i, j_tile * BLOCK_N + o_j
    p_out += (i_b * n_h + i_h).to(tl.int64) * n_rows * n_columns
    tl.store(
        p_out + i.to(tl.int64) * n_columns + j, cast(acc, p_out.dtype.element_ty), mask=(i < n_rows) & (j < n_columns)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def bias_gradient(s: Saved, t: TermPointers, a: tuple, seen: tuple) -> Tensor:
    """Σ dS over what the bias is broadcast over, in the bias's shape and dtype. seen: the call's signature."""
    (B, H, Lq, D), Lk = a.q.shape, a.k.shape[2]
    chosen = tiles_for("bias", a)
    of_batch, of_heads, of_queries, of_keys = a.bias.shape
    rows = 1 if of_queries == 1 else cdiv(Lq, chosen.BLOCK_M)
    columns = 1 if of_keys == 1 else cdiv(Lk, chosen.BLOCK_N)
    out = torch.empty_like(a.bias, memory_format=torch.contiguous_format)
    launch(
        bias_kernel, of_batch * of_heads * rows * columns, chosen, seen,
        *s, out, with_bounds(t, chosen), *numbers(a), B // max(of_batch, 1), H // max(of_heads, 1),
        of_queries == 1, of_keys == 1,
        D, chosen.BLOCK_M, chosen.BLOCK_N, block_d(D),
    )  # fmt: skip
    return out

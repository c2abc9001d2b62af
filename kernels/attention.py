"""Flash attention with every positional term and mask: one pass over the keys with a running softmax (Dao et al. 2022;
Milakov & Gimelshein 2018).

A program owns BLOCK_M queries of one head and walks the tiles of keys that they see: first the full tiles, without any
mask arithmetic, then the edges. What is added to scores and hidden from them: kernels/terms.py. Shapes and meanings:
fastlm/ops/attention.py.

Scores have a unit. With 16-bit inputs they are kept in multiples of 1/scale, so that a table can be the product's
first accumulator, which costs the softmax nothing, and exp is one multiply-add and one exp2. With fp32 inputs they are
natural, for a large table in the accumulator would cost the product its last bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import numbers, rows, terms, tiles_for, with_bounds
from fastlm.kernels.terms import (
    UNSPECIALIZED,
    Head,
    Numbers,
    by_distance,
    distance_rows,
    key_count,
    scores,
    survive,
    tiles_of_keys,
    units,
)
from fastlm.kernels.tile import LOG2E, cast, dot, edge_tile, fma, load_head, load_rows, store_rows
from fastlm.kernels.tiles import block_d

# running maximum before any key: finite, so that a row seeing nothing never meets -inf - -inf
NOTHING = tl.constexpr(-3.4028234663852886e38)

# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def forward_tile(
    q, q_position, acc, m, l, p_k, p_v, stride_k, stride_v, p_k_position, t, head, i0, tile, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax: acc [M, D] = Σ p̂ v, l [M] = Σ p, both relative to the maximum m
    [M]."""
    j0 = tile * BLOCK_N
    k = load_rows(p_k, j0, head.n_keys, stride_k, D, BLOCK_N, BLOCK_D, EDGE)
    k_position = (
        k
        if p_k_position is None
        else load_rows(p_k_position, j0, head.n_keys, t.k_position_strides[2], D, BLOCK_N, BLOCK_D, EDGE)
    )
    x = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, EDGE, False)
    to_unit, to_log2 = units(q.dtype, n.scale)
    m_new = tl.maximum(m, tl.max(x, 1) * to_unit)
    p = tl.exp2(fma(x, to_unit, -m_new[:, None]) * to_log2)
    rescale = tl.exp2((m - m_new) * to_log2)
    v = load_rows(p_v, j0, head.n_keys, stride_v, D, BLOCK_N, BLOCK_D, EDGE)
    kept = cast(survive(p, head, i0, j0, n, BLOCK_M, BLOCK_N, False), v.dtype)
    acc = dot(kept, v, acc * rescale[:, None])
    if t.value_vectors is not None:
        acc = dot(
            by_distance(kept, BLOCK_M, False, False),
            distance_rows(t.value_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D),
            acc,
        )
    return acc, m_new, fma(l, rescale, tl.sum(p, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Kernel


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, q_strides, k_strides, v_strides, t, H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = Numbers(H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale)
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = tl.program_id(0) // n_tiles
    i0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M  # under a causal mask the last queries have most to do
    b, h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    head = Head(b, h, key_count(t, b, Lk))
    p_k += b * k_strides[0] + h // group * k_strides[1]
    p_v += b * v_strides[0] + h // group * v_strides[1]
    p_k_position = (
        None
        if t.k_position is None
        else t.k_position + (b * t.k_position_strides[0] + h // group * t.k_position_strides[1])
    )

    q = load_rows(p_q + (b * q_strides[0] + h * q_strides[1]), i0, Lq, q_strides[2], D, BLOCK_M, BLOCK_D, True)
    q_position = (
        q if t.q_position is None else load_head(t.q_position, t.q_position_strides, b, h, i0, Lq, D, BLOCK_M, BLOCK_D)
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, l = tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    begin, full_begin, full_end, end = tiles_of_keys(t, head, i0, n, BLOCK_M, BLOCK_N)
    for tile in tl.range(full_begin, full_end, disable_licm=True):
        acc, m, l = forward_tile(
            q, q_position, acc, m, l, p_k, p_v, k_strides[2], v_strides[2], p_k_position, t, head, i0, tile, n,
            D, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for step in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
        acc, m, l = forward_tile(
            q, q_position, acc, m, l, p_k, p_v, k_strides[2], v_strides[2], p_k_position, t, head, i0,
            edge_tile(step, begin, full_begin, full_end), n, D, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip

    o_i = tl.arange(0, BLOCK_M)
    seen = tl.where(l == 0, 1.0, l)
    store_rows(acc * (kept_scale / seen)[:, None], p_out + i_bh.to(tl.int64) * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D)
    _, to_log2 = units(q.dtype, scale)
    lse = tl.where(l == 0, float("-inf"), m * (to_log2 / LOG2E) + tl.log(seen))
    tl.store(p_lse + i_bh.to(tl.int64) * Lq + i0 + o_i, lse, mask=o_i < Lq - i0)


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def forward(a: tuple) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op `attention`."""
    B, H, Lq, D = a.q.shape
    q, k, v = rows(a.q), rows(a.k), rows(a.v)
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, Lq, dtype=torch.float32)
    with torch.cuda.device_of(q):
        chosen = tiles_for("forward", a)
        t = with_bounds(terms(a), chosen)
        forward_kernel[(triton.cdiv(Lq, chosen.BLOCK_M) * H * B,)](
            q,
            k,
            v,
            out,
            lse,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            t,
            *numbers(a),
            D,
            BLOCK_D=block_d(D),
            **chosen._asdict(),
        )
    return out, lse

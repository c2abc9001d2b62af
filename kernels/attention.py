"""Flash attention with a distance table: one pass over the keys with a running softmax (Dao et al. 2022; Milakov & Gimelshein 2018).

A program owns BLOCK_M queries of one head and walks the tiles of keys that the band and the key lengths leave visible:
first the full tiles, without any mask arithmetic, then the edges. Shapes and meanings: fastlm/ops/attention.py.

Scores have a unit. With 16-bit inputs they are kept in multiples of 1/scale, so that the table can be the product's
first accumulator, which costs the softmax nothing, and exp is one multiply-add and one exp2. With fp32 inputs they are
natural, for a large table in the accumulator would cost the product its last bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.tile import LOG2E, architecture, cast, dot, edge_tile, fma, load_rows, look_up, rows, store_rows, tiles_in_band, with_margins
from fastlm.kernels.tiles import block_d, tiles

NOTHING = tl.constexpr(-1e30)  # running maximum before any key: finite, so that a row seeing nothing never meets -inf - -inf

# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def key_count(p_lengths, b, Lk):
    """How many of Lk keys row b of the batch has."""
    return Lk if p_lengths is None else tl.minimum(tl.load(p_lengths + b).to(tl.int32), Lk)


@triton.jit
def units(dtype: tl.constexpr, scale):
    """(score → unit of the running maximum, that unit → log₂). One of them is 1: see the top of this file."""
    if dtype == tl.float32:
        return 1.0, LOG2E
    return scale * LOG2E, 1.0


@triton.jit
def product(a, b, bias, scale):
    """Scores of a @ b with a bias, in the unit of their dtype."""
    if a.dtype == tl.float32:
        x = dot(a, b)
        return x * scale if bias is None else fma(x, scale, bias)
    return dot(a, b, None if bias is None else bias * (1.0 / scale))


@triton.jit
def scores(a, b, p_table, o_i, o_j, i0, j0, Lq, n_keys, left, right, offset, scale, EDGE: tl.constexpr):
    """Scores of a tile, -inf where invisible. o_i, o_j: places of queries and keys in the tile, one a row, one a column, so
    that the same lines serve queries × keys and keys × queries. EDGE: some pairs may be invisible, or not exist; those
    of queries that do not exist are left as they are, for nobody reads them.
    """
    x = product(a, b, None if p_table is None else look_up(p_table + (j0 - i0 + Lq - 1) + (o_j - o_i)), scale)
    if EDGE:
        nearest = o_i + (i0 + offset - j0)  # where in the tile the query itself would stand
        visible = (o_j >= nearest - left) & (o_j <= tl.minimum(nearest + right, n_keys - 1 - j0))
        x = tl.where(visible, x, float("-inf"))
    return x


@triton.jit
def forward_tile(
    q, acc, m, l, p_k, p_v, p_table, tile, i0, Lq, n_keys, left, right, offset, scale, stride_k, stride_v,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax: acc [M, D] = Σ p v, l [M] = Σ p, both relative to the maximum m [M]."""
    j0 = tile * BLOCK_N
    o_i, o_j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    k = load_rows(p_k, j0, n_keys, stride_k, D, BLOCK_N, BLOCK_D, EDGE)
    x = scores(q, k.T, p_table, o_i, o_j, i0, j0, Lq, n_keys, left, right, offset, scale, EDGE)
    to_unit, to_log2 = units(q.dtype, scale)
    m_new = tl.maximum(m, tl.max(x, 1) * to_unit)
    p = tl.exp2(fma(x, to_unit, -m_new[:, None]) * to_log2)
    rescale = tl.exp2((m - m_new) * to_log2)
    v = load_rows(p_v, j0, n_keys, stride_v, D, BLOCK_N, BLOCK_D, EDGE)
    acc = dot(cast(p, v.dtype), v, acc * rescale[:, None])
    return acc, m_new, fma(l, rescale, tl.sum(p, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Kernel


@triton.jit(do_not_specialize=["Lq", "Lk", "left", "right", "offset"])
def forward_kernel(
    p_q, p_k, p_v, p_table, p_lengths, p_out, p_lse, q_strides, k_strides, v_strides, table_stride, H, group, Lq, Lk, left, right, offset, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = tl.program_id(0) // n_tiles
    i0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M  # under a causal mask the last queries have most to do
    b, h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += b * q_strides[0] + h * q_strides[1]
    p_k += b * k_strides[0] + h // group * k_strides[1]
    p_v += b * v_strides[0] + h // group * v_strides[1]
    if p_table is not None:
        p_table += h * table_stride
    n_keys = key_count(p_lengths, b, Lk)

    q = load_rows(p_q, i0, Lq, q_strides[2], D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, l = tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    last = tl.minimum(i0 + BLOCK_M, Lq) - 1
    begin, full_begin, full_end, end = tiles_in_band(i0 + offset, last + offset, left, right, n_keys, BLOCK_N)
    for tile in tl.range(full_begin, full_end, disable_licm=True):
        acc, m, l = forward_tile(
            q, acc, m, l, p_k, p_v, p_table, tile, i0, Lq, n_keys, left, right, offset, scale, k_strides[2], v_strides[2],
            D, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for t in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
        acc, m, l = forward_tile(
            q, acc, m, l, p_k, p_v, p_table, edge_tile(t, begin, full_begin, full_end), i0, Lq, n_keys, left, right, offset, scale,
            k_strides[2], v_strides[2], D, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip

    o_i = tl.arange(0, BLOCK_M)
    seen = tl.where(l == 0, 1.0, l)
    store_rows(acc * (1.0 / seen)[:, None], p_out + i_bh.to(tl.int64) * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D)
    to_unit, to_log2 = units(q.dtype, scale)
    lse = tl.where(l == 0, float("-inf"), m * (to_log2 / LOG2E) + tl.log(seen))
    tl.store(p_lse + i_bh.to(tl.int64) * Lq + i0 + o_i, lse, mask=o_i < Lq - i0)


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def forward(q, k, v, table, key_lengths, left, right, scale, offset) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op `attention`, whose arguments these are; the rest of them are absent."""
    (B, H, Lq, D), (Hk, Lk) = q.shape, k.shape[1:3]
    q, k, v = rows(q), rows(k), rows(v)
    table, table_stride = with_margins(table, Lq, Lk)
    key_lengths = None if key_lengths is None else key_lengths.contiguous()
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, Lq, dtype=torch.float32)
    with torch.cuda.device_of(q):
        chosen = tiles("forward", D, q.dtype, architecture())
        forward_kernel[(triton.cdiv(Lq, chosen.BLOCK_M) * H * B,)](
            q, k, v, table, key_lengths, out, lse, q.stride()[:3], k.stride()[:3], v.stride()[:3], table_stride,
            H, H // Hk, Lq, Lk, left, right, offset, scale, D, BLOCK_D=block_d(D), **chosen._asdict(),
        )  # fmt: skip
    return out, lse

"""One tile of keys into a running softmax, and its end (Milakov & Gimelshein 2018; lines of algorithms are those of
FlashAttention-2, Dao 2023).

Scores have a unit. With 16-bit inputs they are kept in multiples of 1/scale, so that a table can be the product's
first accumulator, which costs the softmax nothing, and exp is one multiply-add and one exp2. With fp32 inputs they are
natural, for a large table in the accumulator would cost the product its last bits; and so they are under a softcap,
which keeps a table out of the accumulator.
"""

import triton
import triton.language as tl

from fastlm.kernels.terms import add_values, apply_dropout, scores, units
from fastlm.kernels.tile import LOG2E, cast, fma, load_position, load_rows

# running maximum before any key: finite, so that a row seeing nothing never meets -inf - -inf
NOTHING = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def forward_tile(
    q, q_position, acc, m, l, keys, values, key_positions, t, head, i0, tile, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax: acc [M, D] = Σ p̂ v, l [M] = Σ p, both relative to the maximum m
    [M].
    """
    # S of the tile (FlashAttention-2, algorithm 1, line 8)
    j0 = tile * BLOCK_N
    k = load_rows(keys, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
    k_position = load_position(key_positions, k, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
    x, _slope = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, EDGE, False)
    # the running maximum, and P relative to it (line 9)
    to_unit, to_log2 = units(q.dtype, n)
    m_new = tl.maximum(m, tl.max(x, 1) * to_unit)
    p = tl.exp2(fma(x, to_unit, -m_new[:, None]) * to_log2)
    # what was summed relative to the old maximum, rescaled; P V added to it (lines 9 and 10)
    rescale = tl.exp2((m - m_new) * to_log2)
    v = load_rows(values, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
    p_dropped = cast(apply_dropout(p, head, i0, j0, n, BLOCK_M, BLOCK_N, False), v.dtype)
    acc = add_values(acc * rescale[:, None], p_dropped, v, t, head, i0, j0, n, D, BLOCK_M, BLOCK_D)
    return acc, m_new, fma(l, rescale, tl.sum(p, 1))


@triton.jit
def finished(acc, m, l, dtype: tl.constexpr, n):
    """O = acc / l and L = m + ln l (lines 12 and 13); rows that saw nothing are zeros, and L = -∞."""
    seen = tl.where(l == 0, 1.0, l)
    _, to_log2 = units(dtype, n)
    lse = tl.where(l == 0, float("-inf"), m * (to_log2 / LOG2E) + tl.log(seen))
    return acc * (n.dropout_scale / seen)[:, None], lse

"""Rows by distance (query_vectors and its kin) in a tile of attention.

They take square tiles: BLOCK × BLOCK pairs meet 2·BLOCK - 1 distances, so the product of the tile's queries with the
rows of those distances, [BLOCK, 2·BLOCK], holds every score once, on a slant that `tl.gather` straightens (Dai et al.
2019, appendix B, do it to the whole L × 2L). Nothing here is larger than that, however long the sequence. Meanings and
shapes: fastlm/ops/attention.py.
"""

import triton
import triton.language as tl

from fastlm.kernels.tile import dot, places


@triton.jit
def distance_rows(p, head, i0, j0, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows [2·BLOCK, BLOCK_D] of p [H, Lq + Lk - 1, D] of a tile; key j and query i meet row j - i + BLOCK."""
    o_row, o_d = tl.arange(0, 2 * BLOCK), tl.arange(0, BLOCK_D)
    first = j0 - i0 + n.Lq - 1 - BLOCK
    m_row = (first + o_row >= 0) & (first + o_row < n.Lq + n.Lk - 1)
    p_rows = p + (head.h * (n.Lq + n.Lk - 1) + first) * D
    return tl.load(p_rows + (o_row[:, None] * D + o_d[None, :]), mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def relative_shift(
    x, p_vectors, head, i0, j0, n,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_FIRST: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """⟨x, row⟩ of each pair of a square tile, with x [BLOCK, BLOCK_D] its queries' or (OF_KEYS) its keys' and the row
    that of their distance.
    """
    o_i, o_j = places(BLOCK, BLOCK, KEYS_FIRST)
    vectors = distance_rows(p_vectors, head, i0, j0, n, D, BLOCK, BLOCK_D)
    # every query with every distance, then the one distance of each pair
    if KEYS_FIRST == OF_KEYS:
        return tl.gather(dot(x, vectors.T), o_j - o_i + BLOCK, axis=1)
    else:
        return tl.gather(dot(vectors, x.T), o_j - o_i + BLOCK, axis=0)


@triton.jit
def by_distance(x, BLOCK: tl.constexpr, KEYS_FIRST: tl.constexpr, OF_KEYS: tl.constexpr):
    """A square tile x of pairs by distance, the pair of key j and query i at j - i + BLOCK, zeros where there is none.

    [BLOCK, 2·BLOCK], a row for each query, or (OF_KEYS) key; transposed, [2·BLOCK, BLOCK], unless those are x's own
    rows.
    """
    if KEYS_FIRST == OF_KEYS:
        o_own, o_distance = tl.arange(0, BLOCK)[:, None], tl.arange(0, 2 * BLOCK)[None, :]
    else:
        o_own, o_distance = tl.arange(0, BLOCK)[None, :], tl.arange(0, 2 * BLOCK)[:, None]
    # of the other side's member of the pair
    place = o_own + BLOCK - o_distance if OF_KEYS else o_own + o_distance - BLOCK
    inside = (place >= 0) & (place < BLOCK)
    return tl.where(inside, tl.gather(x, tl.where(inside, place, 0), axis=1 if KEYS_FIRST == OF_KEYS else 0), 0.0)

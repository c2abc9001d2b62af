"""What attention hides in a tile of scores, and which tiles nobody need visit: band, prefix, lengths, segments, ranks.

A walk visits the tiles from `begin` to `end`; those from `full_begin` to `full_end` hold visible pairs alone and are
computed without any mask. Meanings and shapes: fastlm/ops/attention.py.
"""

import triton
import triton.language as tl

from fastlm.kernels.tile import load_readonly

# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@triton.jit
def key_count(t, b, Lk):
    """How many of Lk keys row b of the batch has."""
    return Lk if t.key_lengths is None else tl.minimum(tl.load(t.key_lengths + b), Lk).to(tl.int32)


@triton.jit
def of_row(p, b, first, o, n):
    """Values of row b of p [B, n] at first + o; places past the end get the last one's, which nobody reads."""
    return load_readonly(p + b * n + tl.minimum(first + o, n - 1))


@triton.jit
def visible(t, head, i0, j0, o_i, o_j, n):
    """Which pairs of a tile attend: all masks at once."""
    nearest = o_i + (i0 + n.offset - j0)  # where in the tile the query itself would stand
    if t.prefix is None:
        seen = (o_j >= nearest - n.left) & (o_j <= tl.minimum(nearest + n.right, head.n_keys - 1 - j0))
    else:
        seen = ((o_j >= nearest - n.left) & (o_j <= nearest + n.right)) | (o_j < prefix_length(t, head) - j0)
        seen = seen & (o_j < head.n_keys - j0)
    if t.q_segments is not None:
        seen = seen & (of_row(t.q_segments, head.b, i0, o_i, n.Lq) == of_row(t.k_segments, head.b, j0, o_j, n.Lk))
    if t.q_ranks is not None:
        seen = seen & (of_row(t.k_ranks, head.b, j0, o_j, n.Lk) <= of_row(t.q_ranks, head.b, i0, o_i, n.Lq))
    return seen


@triton.jit
def prefix_length(t, head):
    """Of row b, no longer than the row."""
    return tl.maximum(tl.minimum(tl.load(t.prefix + head.b), head.n_keys).to(tl.int32), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Which tiles to visit: (begin, full_begin, full_end, end) as in tiles_in_band


@triton.jit
def tiles_of_keys(t, head, i0, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys that the queries from i0 on see."""
    last = tl.minimum(i0 + BLOCK_M, n.Lq) - 1
    begin, full_begin, full_end, end = tiles_in_band(
        i0 + n.offset, last + n.offset, n.left, n.right, head.n_keys, BLOCK_N
    )
    if t.prefix is not None:
        length = prefix_length(t, head)
        # with a gap between prefix and band, tiles in it are visited for nothing
        joined = full_begin <= length // BLOCK_N
        begin, full_begin = tl.where(length > 0, 0, begin), tl.where(joined, 0, full_begin)
        full_end = tl.where(joined, tl.maximum(full_end, length // BLOCK_N), full_end)
        end = tl.maximum(end, tl.cdiv(length, BLOCK_N))
    if t.q_ranks is not None:
        full_end = full_begin
    if t.q_segments is not None:
        own = of_row(t.q_segments, head.b, i0, tl.arange(0, BLOCK_M), n.Lq)
        begin, full_begin, full_end, end = with_segments(
            t.k_bounds, head.b, own, tl.cdiv(n.Lk, BLOCK_N), begin, full_begin, full_end, end
        )
    return begin, full_begin, full_end, end


@triton.jit
def tiles_of_queries(t, head, j0, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of queries that see the keys from j0 on; no query sees keys that do not exist."""
    last = tl.minimum(j0 + BLOCK_N, head.n_keys) - 1
    n_rows = tl.where(j0 < head.n_keys, n.Lq, 0)
    begin, full_begin, full_end, end = tiles_in_band(j0 - n.offset, last - n.offset, n.right, n.left, n_rows, BLOCK_M)
    if t.prefix is not None:
        length = prefix_length(t, head)
        begin, end = tl.where(j0 < length, 0, begin), tl.where(j0 < length, tl.cdiv(n_rows, BLOCK_M), end)
        full_begin = tl.where(last < length, 0, full_begin)
        full_end = tl.where(last < length, n_rows // BLOCK_M, full_end)
    if t.q_ranks is not None:
        full_end = full_begin
    if t.q_segments is not None:
        own = of_row(t.k_segments, head.b, j0, tl.arange(0, BLOCK_N), n.Lk)
        begin, full_begin, full_end, end = with_segments(
            t.q_bounds, head.b, own, tl.cdiv(n.Lq, BLOCK_M), begin, full_begin, full_end, end
        )
    return begin, full_begin, full_end, end


@triton.jit
def with_segments(p_bounds, b, own, n_tiles, begin, full_begin, full_end, end):
    """The range of tiles narrowed to those that hold a segment of `own`; full ones hold one segment, the only one of
    `own`.

    Segments may come in any order; full tiles that do not lie side by side are taken for edges.
    """
    CHUNK: tl.constexpr = 128
    low, high = tl.min(own, 0), tl.max(own, 0)
    first, after, first_full, after_full, n_full = n_tiles, 0, n_tiles, 0, 0
    p_bounds += b * 2 * n_tiles
    for chunk in range(begin // CHUNK, tl.cdiv(end, CHUNK)):
        tile = chunk * CHUNK + tl.arange(0, CHUNK)
        m_tile = (tile >= begin) & (tile < end)
        lows = tl.load(p_bounds + tile, mask=m_tile, other=0)
        highs = tl.load(p_bounds + n_tiles + tile, mask=m_tile, other=0)
        # tiles that may hold a segment of own, and those that hold no other
        some = m_tile & (lows <= high) & (highs >= low)
        full = m_tile & (lows == highs) & (lows == low) & (low == high)
        first = tl.minimum(first, tl.min(tl.where(some, tile, n_tiles), 0))
        after = tl.maximum(after, tl.max(tl.where(some, tile + 1, 0), 0))
        first_full = tl.minimum(first_full, tl.min(tl.where(full, tile, n_tiles), 0))
        after_full = tl.maximum(after_full, tl.max(tl.where(full, tile + 1, 0), 0))
        n_full += tl.sum(full.to(tl.int32), 0)
    begin = tl.minimum(first, end)
    end = tl.maximum(after, begin)
    contiguous = after_full - first_full == n_full
    full_begin = tl.minimum(tl.maximum(tl.where(contiguous, tl.maximum(full_begin, first_full), end), begin), end)
    full_end = tl.maximum(tl.where(contiguous, tl.minimum(full_end, after_full), full_begin), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def tiles_meet(t, head, i_tile, j_tile, n, BLOCK: tl.constexpr):
    """Whether a tile of queries and one of keys hold a segment in common."""
    p_q = t.q_bounds + head.b * 2 * tl.cdiv(n.Lq, BLOCK) + i_tile
    p_k = t.k_bounds + head.b * 2 * tl.cdiv(n.Lk, BLOCK) + j_tile
    return (tl.load(p_q) <= tl.load(p_k + tl.cdiv(n.Lk, BLOCK))) & (tl.load(p_q + tl.cdiv(n.Lq, BLOCK)) >= tl.load(p_k))


@triton.jit
def tiles_in_band(first, last, below, above, n, BLOCK: tl.constexpr):
    """Which tiles of BLOCK positions out of n the positions first … last see, when x sees x - below … x + above.

    Returns (begin, full_begin, full_end, end), counted in tiles: all of [begin, end) is seen by some, all of
    [full_begin, full_end) by every one of them. begin ≤ full_begin ≤ full_end ≤ end.
    """
    begin = tl.maximum(first - below, 0) // BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(tl.minimum(last + above + 1, n), 0), BLOCK), begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last - below, 0), BLOCK), begin), end)
    full_end = tl.maximum(tl.minimum(tl.maximum(tl.minimum(first + above + 1, n), 0) // BLOCK, end), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def edge_tile(t, begin, full_begin, full_end):
    """The t-th of the tiles seen by some but not by all: first those before full_begin, then those from full_end on."""
    return begin + t + tl.where(begin + t < full_begin, 0, full_end - full_begin)

"""What attention adds to a tile of scores, what it hides in it, and which tiles nobody need visit: one place for all
kernels.

A tile holds scores of BLOCK_M queries from i0 on with BLOCK_N keys from j0 on, either way up: queries × keys, or keys ×
queries (KEYS_FIRST) where a program owns keys. o_i and o_j are the places of queries and keys in it, the one a row, the
other a column.

Rows by distance (query_vectors and its kin) take square tiles: BLOCK × BLOCK pairs meet 2·BLOCK - 1 distances, so the
product of the tile's queries with the rows of those distances, [BLOCK, 2·BLOCK], holds every score once, on a slant
that `tl.gather` straightens (Dai et al. 2019, appendix B, do it to the whole L × 2L). Nothing here is larger than that,
however long the sequence. Meanings and shapes: fastlm/ops/attention.py."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastlm.kernels.tile import LOG2E, dot, fma, look_up, tiles_in_band

# ---------------------------------------------------------------------------------------------------------------------
# What kernels are given


class Terms(NamedTuple):
    """Pointers to a call's terms and masks, None for those it does not have, which then cost nothing; strides of some.

    q_bounds, k_bounds [B, 2, tiles]: the least and the largest segment in each tile of queries, of keys.
    """

    table: Any
    table_stride: Any
    bias: Any
    bias_strides: Any
    q_position: Any
    q_position_strides: Any
    query_vectors: Any
    k_position: Any
    k_position_strides: Any
    key_vectors: Any
    value_vectors: Any
    same: Any
    q_groups: Any
    k_groups: Any
    key_lengths: Any
    prefix: Any
    q_segments: Any
    k_segments: Any
    q_bounds: Any
    k_bounds: Any
    q_ranks: Any
    k_ranks: Any


class Numbers(NamedTuple):
    """A call's numbers. threshold: of dropout (fastlm/backends/philox.py), None for none; kept_scale: 1/(1 - dropout)."""

    H: Any
    group: Any
    Lq: Any
    Lk: Any
    left: Any
    right: Any
    offset: Any
    scale: Any
    seed: Any
    threshold: Any
    kept_scale: Any


class Head(NamedTuple):
    """What a program works on: a row of the batch, a query head, and how many keys that row has."""

    b: Any
    h: Any
    n_keys: Any


# compiled kernels do not depend on these numbers
UNSPECIALIZED = ["Lq", "Lk", "left", "right", "offset", "seed", "threshold"]

# ---------------------------------------------------------------------------------------------------------------------
# Scores


@triton.jit
def places(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """(o_i, o_j) of a tile."""
    if KEYS_FIRST:
        return tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
    else:
        return tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def key_count(t, b, Lk):
    """How many of Lk keys row b of the batch has."""
    return Lk if t.key_lengths is None else tl.minimum(tl.load(t.key_lengths + b), Lk).to(tl.int32)


@triton.jit
def of_row(p, b, first, o, n):
    """Values of row b of p [B, n] at first + o; places past the end get the last one's, which nobody reads."""
    return look_up(p + b * n + tl.minimum(first + o, n - 1))


@triton.jit
def plus(x, y):
    return y if x is None else x + y


@triton.jit
def distance_rows(p, head, i0, j0, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows [2·BLOCK, BLOCK_D] of p [H, Lq + Lk - 1, D] that a tile meets: that of key j and query i at j - i +
    BLOCK."""
    o_row, o_d = tl.arange(0, 2 * BLOCK), tl.arange(0, BLOCK_D)
    first = j0 - i0 + n.Lq - 1 - BLOCK
    m_row = (first + o_row >= 0) & (first + o_row < n.Lq + n.Lk - 1)
    p_rows = p + (head.h * (n.Lq + n.Lk - 1) + first) * D
    return tl.load(p_rows + (o_row[:, None] * D + o_d[None, :]), mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def at_pairs(
    x,
    p_vectors,
    head,
    i0,
    j0,
    n,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """⟨x, row⟩ of each pair of a square tile, with x [BLOCK, BLOCK_D] its queries' or (OF_KEYS) its keys' and the row
    that of their distance."""
    o_i, o_j = places(BLOCK, BLOCK, KEYS_FIRST)
    vectors = distance_rows(p_vectors, head, i0, j0, n, D, BLOCK, BLOCK_D)
    if KEYS_FIRST == OF_KEYS:
        return tl.gather(dot(x, vectors.T), o_j - o_i + BLOCK, axis=1)
    else:
        return tl.gather(dot(vectors, x.T), o_j - o_i + BLOCK, axis=0)


@triton.jit
def table_at(t, h, first, o_i, o_j, n):
    """The table's score of each pair of a tile, given j0 - i0."""
    return look_up(t.table + (h * t.table_stride + (first + n.Lq - 1)) + (o_j - o_i))


@triton.jit
def bias_at(t, head, i0, j0, o_i, o_j, n):
    i, j = tl.minimum(i0 + o_i, n.Lq - 1).to(tl.int64), tl.minimum(j0 + o_j, n.Lk - 1).to(tl.int64)
    p_bias = t.bias + (head.b * t.bias_strides[0] + head.h * t.bias_strides[1])
    return tl.load(p_bias + (i * t.bias_strides[2] + j * t.bias_strides[3])).to(tl.float32)


@triton.jit
def within_half(x):
    """x, no less than fp16's least number unless it is -inf. Where a mask of -1e9, or of the least float, hides a whole
    row, the softmax of what it hides is asked for; in units of 1/scale that number overflows, and its rounding
    outweighs the scores."""
    return tl.where(x == float("-inf"), x, tl.maximum(x, -65504.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def same_at(t, head, i0, j0, o_i, o_j, n):
    return tl.where(same_group(t, head, i0, j0, o_i, o_j, n), of_row(t.same, head.b * n.H + head.h, i0, o_i, n.Lq), 0.0)


@triton.jit
def same_group(t, head, i0, j0, o_i, o_j, n):
    return of_row(t.q_groups, head.b, i0, o_i, n.Lq) == of_row(t.k_groups, head.b, j0, o_j, n.Lk)


@triton.jit
def product(a, b, related, added, scale):
    """scale · (a @ b + related) + added, in the unit of their dtype (kernels/attention.py)."""
    if a.dtype == tl.float32:
        x = plus(related, dot(a, b))
        return x * scale if added is None else fma(x, scale, added)
    else:
        return dot(a, b, related if added is None else plus(related, added * (1.0 / scale)))


@triton.jit
def scores(
    q, k, q_position, k_position, t, head, i0, j0, n, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr, KEYS_FIRST: tl.constexpr, table=None,
):  # fmt: skip
    """Scores of a tile, -inf where invisible. q_position, k_position: what meets the rows by distance. table: its part,
    if at hand.

    EDGE: some pairs may be invisible, or not exist; those of queries that do not exist are whatever they are, for
    nobody reads them."""
    o_i, o_j = places(BLOCK_M, BLOCK_N, KEYS_FIRST)
    related, added = None, table
    if t.query_vectors is not None:
        related = at_pairs(q_position, t.query_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D, KEYS_FIRST, False)
    if t.key_vectors is not None:
        related = plus(
            related, at_pairs(k_position, t.key_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D, KEYS_FIRST, True)
        )
    if t.table is not None and table is None:
        added = table_at(t, head.h, j0 - i0, o_i, o_j, n)
    if t.bias is not None:
        bias = bias_at(t, head, i0, j0, o_i, o_j, n)
        added = plus(added, bias if q.dtype == tl.float32 else within_half(bias))
    if t.same is not None:
        added = plus(added, same_at(t, head, i0, j0, o_i, o_j, n))
    x = product(k, q.T, related, added, n.scale) if KEYS_FIRST else product(q, k.T, related, added, n.scale)
    return tl.where(visible(t, head, i0, j0, o_i, o_j, n), x, float("-inf")) if EDGE else x


@triton.jit
def visible(t, head, i0, j0, o_i, o_j, n):
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
# Probabilities


@triton.jit
def units(dtype: tl.constexpr, scale):
    """(score → unit of the running maximum and of lse, that unit → log₂). One of them is 1: see
    kernels/attention.py."""
    if dtype == tl.float32:
        return 1.0, LOG2E
    return scale * LOG2E, 1.0


@triton.jit
def probabilities(x, lse, dtype: tl.constexpr, scale):
    """exp(x - lse) from scores and lse in the unit of their dtype."""
    to_unit, to_log2 = units(dtype, scale)
    return tl.exp2(fma(x, to_unit, -lse) * to_log2)


@triton.jit
def load_vector(p, i0, Lq, BLOCK: tl.constexpr, other: tl.constexpr, EDGE: tl.constexpr):
    """Elements i0 … i0 + BLOCK - 1 of the fp32 vector [Lq] at p. EDGE: some may lie past its end, and are `other`."""
    o_i = tl.arange(0, BLOCK)
    if EDGE:
        return tl.where(o_i < Lq - i0, look_up(p + i0 + tl.minimum(o_i, Lq - 1 - i0)), other)
    return look_up(p + i0 + o_i)


@triton.jit
def survive(p, head, i0, j0, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """p where dropout keeps it, 0 elsewhere: word j mod 4 of the counter (j div 4, i, b·H + h, 0), as in
    fastlm/backends/philox.py."""
    if n.threshold is None:
        return p
    else:
        row = (head.b * n.H + head.h).to(tl.int32)
        i, block = tl.broadcast((i0 + tl.arange(0, BLOCK_M))[:, None], (j0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :])
        w0, w1, w2, w3 = tl.philox(n.seed, block, i, tl.zeros_like(i) + row, tl.zeros_like(i))
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        keep = (words >= n.threshold.to(tl.uint32)).to(tl.int8)  # bytes, for they cross threads
        return tl.where((keep.T if KEYS_FIRST else keep) != 0, p, 0.0)


@triton.jit
def gradient(
    grad, v, t, head, i0, j0, n, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """dL/dp of a tile: ⟨grad[i], v[j] + value_vectors[d]⟩, through dropout."""
    dp = dot(v, grad.T) if KEYS_FIRST else dot(grad, v.T)
    if t.value_vectors is not None:
        dp += at_pairs(grad, t.value_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D, KEYS_FIRST, False)
    return dp if n.threshold is None else survive(dp, head, i0, j0, n, BLOCK_M, BLOCK_N, KEYS_FIRST) * n.kept_scale


@triton.jit
def by_distance(x, BLOCK: tl.constexpr, KEYS_FIRST: tl.constexpr, OF_KEYS: tl.constexpr):
    """A square tile x of pairs spread over their distances, the pair of key j and query i to j - i + BLOCK, zeros where
    there is none.

    [BLOCK, 2·BLOCK], a row for each query, or (OF_KEYS) key; transposed, [2·BLOCK, BLOCK], unless those are x's own
    rows."""
    if KEYS_FIRST == OF_KEYS:
        o_own, o_distance = tl.arange(0, BLOCK)[:, None], tl.arange(0, 2 * BLOCK)[None, :]
    else:
        o_own, o_distance = tl.arange(0, BLOCK)[None, :], tl.arange(0, 2 * BLOCK)[:, None]
    # of the other side's member of the pair
    place = o_own + BLOCK - o_distance if OF_KEYS else o_own + o_distance - BLOCK
    inside = (place >= 0) & (place < BLOCK)
    return tl.where(inside, tl.gather(x, tl.where(inside, place, 0), axis=1 if KEYS_FIRST == OF_KEYS else 0), 0.0)


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
        full_end, end = (
            tl.where(joined, tl.maximum(full_end, length // BLOCK_N), full_end),
            tl.maximum(end, tl.cdiv(length, BLOCK_N)),
        )
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
        full_begin, full_end = (
            tl.where(last < length, 0, full_begin),
            tl.where(last < length, n_rows // BLOCK_M, full_end),
        )
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
        lows, highs = (
            tl.load(p_bounds + tile, mask=m_tile, other=0),
            tl.load(p_bounds + n_tiles + tile, mask=m_tile, other=0),
        )
        some = m_tile & (lows <= high) & (highs >= low)
        full = m_tile & (lows == highs) & (lows == low) & (low == high)
        first, after = (
            tl.minimum(first, tl.min(tl.where(some, tile, n_tiles), 0)),
            tl.maximum(after, tl.max(tl.where(some, tile + 1, 0), 0)),
        )
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
    p_q, p_k = (
        t.q_bounds + head.b * 2 * tl.cdiv(n.Lq, BLOCK) + i_tile,
        t.k_bounds + head.b * 2 * tl.cdiv(n.Lk, BLOCK) + j_tile,
    )
    return (tl.load(p_q) <= tl.load(p_k + tl.cdiv(n.Lk, BLOCK))) & (tl.load(p_q + tl.cdiv(n.Lq, BLOCK)) >= tl.load(p_k))

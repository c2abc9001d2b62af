"""Gradients of what belongs to a distance: the table, and the rows of vectors.

Tiles on one block diagonal hold the same distances at the same places. So a program that owns a block diagonal of a
head adds dS tile upon tile in registers and sums along the diagonals once, at the end (the table); and for rows by
distance it adds the tile's dS, spread over distances, times the queries or keys that met them. The table's tiles are
large, since each loads its rows anew, and taken BLOCK_N keys at a time. Programs write partial sums, 2·BLOCK_N
distances for each BLOCK_N × BLOCK_N pairs, half of which the next diagonal shares; a second kernel adds them in a fixed
order. No atomics: the bits repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import VECTORS, Saved, launch, numbers, tiles_for, with_bounds
from fastlm.kernels.masks import key_count, tiles_meet
from fastlm.kernels.rows_by_distance import by_distance
from fastlm.kernels.terms import (
    UNSPECIALIZED,
    Head,
    Numbers,
    TermPointers,
    apply_dropout,
    probabilities,
    probability_gradient,
    scores,
    under_cap,
)
from fastlm.kernels.tile import Matrix, cast, dot, fma, head_of, load_position, load_rows, load_vector, store_rows
from fastlm.kernels.tiles import block_d, cdiv, power_of_two

# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def distance_tile(
    accs, dquery, dkey, dvalue, queries, keys, values, grads, p_lse, p_delta, query_positions, key_positions, t, head,
    tile, diagonal, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The tile in row `tile` of a block diagonal into its sums: accs, [BLOCK, BLOCK_N] each, += dS, the others
    [2·BLOCK, D], where BLOCK_N is BLOCK; [1, 1] are not wanted.
    """
    i0 = tile * BLOCK
    q = load_rows(queries, i0, n.Lq, D, BLOCK, BLOCK_D, EDGE)
    grad = load_rows(grads, i0, n.Lq, D, BLOCK, BLOCK_D, EDGE)
    q_position = load_position(query_positions, q, i0, n.Lq, D, BLOCK, BLOCK_D, EDGE)
    lse = load_vector(p_lse, i0, n.Lq, BLOCK, float("inf"), EDGE)[:, None]
    delta = load_vector(p_delta, i0, n.Lq, BLOCK, 0.0, EDGE)[:, None]
    summed = ()
    for column in tl.static_range(BLOCK // BLOCK_N):
        j0 = (tile + diagonal) * BLOCK + column * BLOCK_N
        k = load_rows(keys, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
        v = load_rows(values, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
        k_position = load_position(key_positions, k, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
        # P and dP - δ once more, as for dq
        x, slope = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK, BLOCK_N, BLOCK_D, EDGE, False)
        p = probabilities(x, lse, q.dtype, n)
        dp = probability_gradient(grad, v, t, head, i0, j0, n, D, BLOCK, BLOCK_N, BLOCK_D, False) - delta
        # the table's dS stays by pair until the end
        acc = accs[column]
        summed += (fma(p, dp, acc) if acc.numel > 1 else acc,)
        # the vectors', under the cap, is spread over distances, times what met them; the values' share is P̂'s
        ds = cast(under_cap(p * dp, slope, n), q.dtype)
        if dquery.numel > 1:
            dquery = dot(by_distance(ds, BLOCK, False, False).T, q_position, dquery)
        if dkey.numel > 1:
            dkey = dot(by_distance(ds, BLOCK, False, True), k_position, dkey)
        if dvalue.numel > 1:
            p_dropped = cast(apply_dropout(p, head, i0, j0, n, BLOCK, BLOCK_N, False), q.dtype)
            dvalue = dot(by_distance(p_dropped, BLOCK, False, False).T, grad, dvalue)
    return summed, dquery, dkey, dvalue


@triton.jit
def diagonal_sums(x, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """x [BLOCK, BLOCK_N] → (sums at column - row = -BLOCK_N … -1, sums at column - row = 0 … BLOCK_N - 1) of each
    square in it, both [BLOCK / BLOCK_N, BLOCK_N].

    Turning row i left by i places brings each diagonal into one column: the part that wrapped around, and the part that
    did not.
    """
    o_i, o_j = tl.arange(0, BLOCK_N)[None, :, None], tl.arange(0, BLOCK_N)[None, None, :]
    place = tl.zeros([BLOCK // BLOCK_N, 1, 1], tl.int32) + (o_i + o_j) % BLOCK_N
    turned = tl.gather(tl.reshape(x, [BLOCK // BLOCK_N, BLOCK_N, BLOCK_N]), place, axis=2)
    straight = o_i + o_j < BLOCK_N
    return tl.sum(tl.where(straight, 0.0, turned), 1), tl.sum(tl.where(straight, turned, 0.0), 1)


@triton.jit
def from_the_middle(i, middle, n):
    """The i-th of 0 … n - 1 by nearness to the middle: to and fro, then what is left of the longer side."""
    middle = tl.maximum(tl.minimum(middle, n - 1), 0)
    shorter = tl.minimum(middle, n - 1 - middle)
    near = middle + tl.where(i % 2 == 0, -(i // 2), i // 2 + 1)
    return tl.where(i <= 2 * shorter, near, tl.where(middle > shorter, n - 1 - i, i))


@triton.jit
def wanted_rows(p, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros for a gradient by distance, or [1, 1] where there is no p to write it to."""
    return tl.zeros([1, 1] if p is None else [2 * BLOCK, BLOCK_D], tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "B", "first", "n_diagonals", "batch_splits", "row_splits"])
def distances_kernel(
    q_rows, k_rows, v_rows, grad_rows, p_lse, p_delta, p_table, p_query, p_key, p_value, t,
    H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale,
    B, first, n_diagonals, batch_splits, row_splits,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of this program's tiles: of the table [H, splits, diagonals, columns, rows, 2·BLOCK_N], a column for
    each BLOCK_N keys and a row for as many queries of a tile; of rows by distance [H, splits, diagonals, 2·BLOCK, D].
    """
    n = Numbers(
        H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale
    )
    # which block diagonal of which head, and which share of the batch and of the diagonal's tiles; the longest begin
    split = tl.program_id(0) % (batch_splits * row_splits)
    h = (tl.program_id(0) // (batch_splits * row_splits) % H).to(tl.int64)
    i_diagonal = from_the_middle(tl.program_id(0) // (batch_splits * row_splits * H), -first, n_diagonals)
    diagonal = first + i_diagonal
    begin = tl.maximum(-diagonal, 0) + split // batch_splits  # the program's first row of tiles

    # where the band hides none of the diagonal's distances, its whole tiles need no mask
    in_band = (diagonal * BLOCK - BLOCK + 1 - offset >= -left) & (diagonal * BLOCK + BLOCK - 1 - offset <= right)
    if t.prefix is not None or t.q_segments is not None or t.q_ranks is not None:
        in_band = False

    COLUMNS: tl.constexpr = BLOCK // BLOCK_N
    accs = ()
    for _ in tl.static_range(COLUMNS):
        accs += (tl.zeros([1, 1] if p_table is None else [BLOCK, BLOCK_N], tl.float32),)
    dquery, dkey = wanted_rows(p_query, BLOCK, BLOCK_D), wanted_rows(p_key, BLOCK, BLOCK_D)
    dvalue = wanted_rows(p_value, BLOCK, BLOCK_D)
    for b_ in range(split % batch_splits, B, batch_splits):
        b = tl.cast(b_, tl.int64)
        head = Head(b, h, key_count(t, b, Lk), None)
        # the tiles that exist, those ahead that are whole, and this program's share of each
        n_tiles = tl.cdiv(tl.maximum(head.n_keys, 0), BLOCK)
        end = tl.minimum(tl.cdiv(Lq, BLOCK), n_tiles - diagonal)
        full_end = tl.maximum(tl.minimum(Lq // BLOCK, tl.maximum(head.n_keys, 0) // BLOCK - diagonal), begin)
        full_end = tl.where(in_band, full_end, begin)
        i_row = (b * H + h) * Lq
        queries, grads = head_of(q_rows, b, h), head_of(grad_rows, b, h)
        keys, values = head_of(k_rows, b, h // group), head_of(v_rows, b, h // group)
        query_positions = None if t.q_position is None else head_of(t.q_position, b, h)
        key_positions = None if t.k_position is None else head_of(t.k_position, b, h // group)
        for tile in tl.range(begin, full_end, row_splits, disable_licm=True):
            accs, dquery, dkey, dvalue = distance_tile(
                accs, dquery, dkey, dvalue, queries, keys, values, grads, p_lse + i_row, p_delta + i_row,
                query_positions, key_positions, t, head, tile, diagonal, n, D, BLOCK, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
        edges = begin + tl.cdiv(full_end - begin, row_splits) * row_splits
        for tile in tl.range(edges, end, row_splits, disable_licm=True):
            meet = True if t.q_segments is None else tiles_meet(t, head, tile, tile + diagonal, n, BLOCK)
            if meet:
                accs, dquery, dkey, dvalue = distance_tile(
                    accs, dquery, dkey, dvalue, queries, keys, values, grads, p_lse + i_row, p_delta + i_row,
                    query_positions, key_positions, t, head, tile, diagonal, n, D, BLOCK, BLOCK_N, BLOCK_D, True,
                )  # fmt: skip
    # partial sums, which distances_sum_kernel adds up
    partial = ((h * batch_splits * row_splits + split) * n_diagonals + i_diagonal) * 2 * BLOCK
    if p_table is not None:
        o_row, o = tl.arange(0, COLUMNS)[:, None], tl.arange(0, BLOCK_N)[None, :]
        for column in tl.static_range(COLUMNS):
            p_column = p_table + (partial + column * 2 * BLOCK_N) * COLUMNS
            below, above = diagonal_sums(accs[column], BLOCK, BLOCK_N)
            tl.store(p_column + (o_row * 2 * BLOCK_N + o), below)
            tl.store(p_column + (o_row * 2 * BLOCK_N + BLOCK_N + o), above)
    if p_query is not None:
        store_rows(dquery * scale, p_query + partial * D, 0, 2 * BLOCK, D, 2 * BLOCK, BLOCK_D)
    if p_key is not None:
        store_rows(dkey * scale, p_key + partial * D, 0, 2 * BLOCK, D, 2 * BLOCK, BLOCK_D)
    if p_value is not None:
        store_rows(dvalue * dropout_scale, p_value + partial * D, 0, 2 * BLOCK, D, 2 * BLOCK, BLOCK_D)


@triton.jit(do_not_specialize=["n_distances", "first", "n_columns", "splits", "n_rows", "Lq"])
def distances_sum_kernel(
    p_partial, p_out, n_distances, first, n_columns, splits, n_rows, Lq,
    W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out [H, n_distances, W] from partial [H, splits, n_columns, ROWS, 2·BLOCK, W], in the order of the splits: a
    column for each BLOCK keys of each diagonal, from first on, and ROWS squares in it, below one another.

    A program sums one block of distances: the non-negative half of some squares, the negative half of those beside
    them. n_rows: how many blocks of negative distances there are.
    """
    n_blocks = tl.cdiv(n_distances - Lq + 1, BLOCK) + n_rows
    h, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks - n_rows
    total = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    for s in range(splits):
        p = p_partial + (h * splits + s) * n_columns * ROWS * 2 * BLOCK * W
        for row in tl.static_range(ROWS):
            i_here, i_next = block - first + row, block + 1 - first + row  # the columns of the two, if they were walked
            n_here = tl.where((i_here >= 0) & (i_here < n_columns), BLOCK, 0)
            n_next = tl.where((i_next >= 0) & (i_next < n_columns), BLOCK, 0)
            here, next_ = (i_here * ROWS + row) * 2 + 1, (i_next * ROWS + row) * 2
            total += load_rows(Matrix(p + here * BLOCK * W, W), 0, n_here, W, BLOCK, BLOCK_W, True)
            total += load_rows(Matrix(p + next_ * BLOCK * W, W), 0, n_next, W, BLOCK, BLOCK_W, True)
    o, o_w = tl.arange(0, BLOCK), tl.arange(0, BLOCK_W)
    place = block * BLOCK + o + Lq - 1
    m_place = ((place >= 0) & (place < n_distances))[:, None] & (o_w < W)[None, :]
    p_place = p_out + h * n_distances * W + (place[:, None] * W + o_w[None, :])
    tl.store(p_place, cast(total, p_out.dtype.element_ty), mask=m_place)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def distance_gradients(s: Saved, t: TermPointers, a: tuple, wanted: set[str], seen: tuple) -> dict[str, Tensor]:
    """Those of table [H, Lq + Lk - 1] and of the rows by distance [H, Lq + Lk - 1, D] that are wanted, summed over the
    batch. seen: the call's signature.
    """
    names = [name for name in ("table", *VECTORS) if name in wanted]
    if not names:
        return {}
    (B, H, Lq, D), Lk = a.q.shape, a.k.shape[2]
    chosen = tiles_for("table", a)
    block, columns = chosen.BLOCK_M, chosen.BLOCK_M // chosen.BLOCK_N
    n_rows, n_columns = cdiv(Lq, block), cdiv(Lk, block)
    first, n_diagonals = 1 - n_rows, n_rows + n_columns - 1
    if a.prefix is None:  # the block diagonals that hold a visible distance, numbered by column - row of their tiles
        first = max(first, cdiv(a.offset - a.left - (block - 1), block))
        n_diagonals = max(0, min(n_columns, (a.offset + a.right + block - 1) // block + 1) - first)
    batch_splits, row_splits = splits_of(
        B, min(n_rows, n_columns), H * n_diagonals, columns**2, len(names) == 1 and names[0] == "table"
    )
    splits = batch_splits * row_splits
    widths = {name: 1 if name == "table" else D for name in names}
    partials = {
        name: s.delta.new_empty(H, splits, n_diagonals, columns, 2 * block, width) for name, width in widths.items()
    }
    t = with_bounds(t, chosen._replace(BLOCK_N=block))
    launch(
        distances_kernel, H * n_diagonals * splits, chosen, (*seen, *names),
        *s, *(partials.get(name) for name in ("table", *VECTORS)), t, *numbers(a),
        B, first, n_diagonals, batch_splits, row_splits, D, block, chosen.BLOCK_N, block_d(D),
    )  # fmt: skip
    made, summed = {}, chosen._replace(num_warps=4, num_stages=3, maxnreg=None)
    for name, width in widths.items():
        made[name] = torch.empty_like(getattr(a, name), memory_format=torch.contiguous_format)
        n_rows = cdiv(Lq, chosen.BLOCK_N)
        launch(
            distances_sum_kernel, H * (n_rows + cdiv(Lk, chosen.BLOCK_N)), summed, (*seen, width),
            partials[name], made[name], Lq + Lk - 1, first * columns, n_diagonals * columns, splits, n_rows, Lq, width,
            columns, chosen.BLOCK_N, power_of_two(width),
        )  # fmt: skip
    return made


def splits_of(B: int, rows: int, programs: int, squares: int, table_alone: bool) -> tuple[int, int]:
    """How many programs share a block diagonal: (over the batch, over rows of tiles).

    About 16 squares for each on the longest one, of which a tile has so many, but no more than fill a GPU, since every
    one writes partial sums of its own.
    """
    enough = cdiv(4096 if table_alone else 1024, max(1, programs))
    splits = max(1, min(16, B * rows * squares // 16, enough))
    batch_splits = max(1, min(B, splits))
    return batch_splits, splits // batch_splits

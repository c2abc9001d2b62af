"""Gradients of what does not belong to one query or key: the table, the rows by distance, and a given bias.

Tiles on one block diagonal hold the same distances at the same places. So a program that owns a block diagonal of a
head adds dS tile upon tile in registers and sums along the diagonals once, at the end (the table); and for rows by
distance it adds the tile's dS, spread over distances, times the queries or keys that met them. Programs write partial
sums, 2·BLOCK distances each, half of which the next block diagonal shares; a second kernel adds them in a fixed order.
For a bias a program owns a tile of its gradient, and walks all that is broadcast over it. No atomics: the bits repeat.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import VECTORS, numbers, tiles_for, with_bounds
from fastlm.kernels.terms import (
    UNSPECIALIZED,
    Head,
    Numbers,
    Terms,
    by_distance,
    gradient,
    key_count,
    load_vector,
    places,
    probabilities,
    scores,
    survive,
    table_at,
    tiles_meet,
    tiles_of_keys,
)  # fmt: skip
from fastlm.kernels.tile import cast, dot, fma, load_head, load_rows, store_rows
from fastlm.kernels.tiles import block_d


class Saved(NamedTuple):
    """What the other kernels left: lse in its unit and δ are [B, H, Lq] fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def distance_tile(
    acc, dquery, dkey, dvalue, p_q, p_k, p_v, p_grad, p_lse, p_delta, stride_q, stride_k, stride_v, p_q_position, p_k_position, hoisted, t, head,
    tile, diagonal, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The tile in row `tile` of a block diagonal into its sums: acc [BLOCK, BLOCK] += dS, the others [2·BLOCK, D]; [1,
    1] are not wanted."""
    i0, j0 = tile * BLOCK, (tile + diagonal) * BLOCK
    q = load_rows(p_q, i0, n.Lq, stride_q, D, BLOCK, BLOCK_D, EDGE)
    k = load_rows(p_k, j0, head.n_keys, stride_k, D, BLOCK, BLOCK_D, EDGE)
    grad = load_rows(p_grad, i0, n.Lq, D, D, BLOCK, BLOCK_D, EDGE)
    v = load_rows(p_v, j0, head.n_keys, stride_v, D, BLOCK, BLOCK_D, EDGE)
    q_position = (
        q
        if p_q_position is None
        else load_rows(p_q_position, i0, n.Lq, t.q_position_strides[2], D, BLOCK, BLOCK_D, EDGE)
    )
    k_position = (
        k
        if p_k_position is None
        else load_rows(p_k_position, j0, head.n_keys, t.k_position_strides[2], D, BLOCK, BLOCK_D, EDGE)
    )
    x = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK, BLOCK, BLOCK_D, EDGE, False, hoisted)
    p = probabilities(x, load_vector(p_lse, i0, n.Lq, BLOCK, float("inf"), EDGE)[:, None], q.dtype, n.scale)
    dp = (
        gradient(grad, v, t, head, i0, j0, n, D, BLOCK, BLOCK, BLOCK_D, False)
        - load_vector(p_delta, i0, n.Lq, BLOCK, 0.0, EDGE)[:, None]
    )
    if acc.numel > 1:
        acc = fma(p, dp, acc)
    ds = cast(p * dp, q.dtype)
    if dquery.numel > 1:
        dquery = dot(by_distance(ds, BLOCK, False, False).T, q_position, dquery)
    if dkey.numel > 1:
        dkey = dot(by_distance(ds, BLOCK, False, True), k_position, dkey)
    if dvalue.numel > 1:
        dvalue = dot(
            by_distance(cast(survive(p, head, i0, j0, n, BLOCK, BLOCK, False), q.dtype), BLOCK, False, False).T,
            grad,
            dvalue,
        )
    return acc, dquery, dkey, dvalue


@triton.jit
def diagonal_sums(x, BLOCK: tl.constexpr):
    """x [BLOCK, BLOCK] → (sums at column - row = -BLOCK … -1, sums at column - row = 0 … BLOCK - 1), each [BLOCK].

    Turning row i left by i places brings each diagonal into one column: the part that wrapped around, and the part that
    did not.
    """
    o_i, o_j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    turned = tl.gather(x, (o_i + o_j) % BLOCK, axis=1)
    straight = o_i + o_j < BLOCK
    return tl.sum(tl.where(straight, 0.0, turned), 0), tl.sum(tl.where(straight, turned, 0.0), 0)


@triton.jit
def wanted_rows(p, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.zeros([1, 1] if p is None else [2 * BLOCK, BLOCK_D], tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "first"])
def distances_kernel(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_table, p_query, p_key, p_value, q_strides, k_strides, v_strides, t,
    H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale, B, first, n_diagonals, batch_splits, row_splits,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of this program's tiles: of the table [H, splits, diagonals, 2·BLOCK], of rows [H, splits,
    diagonals, 2·BLOCK, D]."""
    n = Numbers(H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale)
    split = tl.program_id(0) % (batch_splits * row_splits)
    i_diagonal = tl.program_id(0) // (batch_splits * row_splits) % n_diagonals
    h = (tl.program_id(0) // (batch_splits * row_splits * n_diagonals)).to(tl.int64)
    diagonal = first + i_diagonal
    begin = tl.maximum(-diagonal, 0) + split // batch_splits  # the program's first row of tiles

    o_i, o_j = places(BLOCK, BLOCK, False)
    hoisted = tl.zeros([BLOCK, BLOCK], tl.float32) if t.table is None else table_at(t, h, diagonal * BLOCK, o_i, o_j, n)
    if t.prefix is None:
        nearest = o_i + (offset - diagonal * BLOCK)
        hoisted = tl.where((o_j >= nearest - left) & (o_j <= nearest + right), hoisted, float("-inf"))
    acc = tl.zeros([1, 1] if p_table is None else [BLOCK, BLOCK], tl.float32)
    dquery, dkey, dvalue = (
        wanted_rows(p_query, BLOCK, BLOCK_D),
        wanted_rows(p_key, BLOCK, BLOCK_D),
        wanted_rows(p_value, BLOCK, BLOCK_D),
    )
    for b_ in range(split % batch_splits, B, batch_splits):
        b = tl.cast(b_, tl.int64)
        head = Head(b, h, key_count(t, b, Lk))
        n_tiles = tl.cdiv(tl.maximum(head.n_keys, 0), BLOCK)
        end = tl.minimum(tl.cdiv(Lq, BLOCK), n_tiles - diagonal)
        full_end = tl.maximum(tl.minimum(Lq // BLOCK, tl.maximum(head.n_keys, 0) // BLOCK - diagonal), begin)
        if t.prefix is not None or t.q_segments is not None or t.q_ranks is not None:
            full_end = begin
        i_row = (b * H + h) * Lq
        p_qh = p_q + (b * q_strides[0] + h * q_strides[1])
        p_kh = p_k + (b * k_strides[0] + h // group * k_strides[1])
        p_vh = p_v + (b * v_strides[0] + h // group * v_strides[1])
        p_qp = (
            None if t.q_position is None else t.q_position + (b * t.q_position_strides[0] + h * t.q_position_strides[1])
        )
        p_kp = (
            None
            if t.k_position is None
            else t.k_position + (b * t.k_position_strides[0] + h // group * t.k_position_strides[1])
        )
        for tile in tl.range(begin, full_end, row_splits, disable_licm=True):
            acc, dquery, dkey, dvalue = distance_tile(
                acc, dquery, dkey, dvalue, p_qh, p_kh, p_vh, p_grad + i_row * D, p_lse + i_row, p_delta + i_row, q_strides[2], k_strides[2],
                v_strides[2], p_qp, p_kp, hoisted, t, head, tile, diagonal, n, D, BLOCK, BLOCK_D, False,
            )  # fmt: skip
        for tile in tl.range(
            begin + tl.cdiv(full_end - begin, row_splits) * row_splits, end, row_splits, disable_licm=True
        ):
            meet = True if t.q_segments is None else tiles_meet(t, head, tile, tile + diagonal, n, BLOCK)
            if meet:
                acc, dquery, dkey, dvalue = distance_tile(
                    acc, dquery, dkey, dvalue, p_qh, p_kh, p_vh, p_grad + i_row * D, p_lse + i_row, p_delta + i_row, q_strides[2], k_strides[2],
                    v_strides[2], p_qp, p_kp, hoisted, t, head, tile, diagonal, n, D, BLOCK, BLOCK_D, True,
                )  # fmt: skip
    partial = ((h * batch_splits * row_splits + split) * n_diagonals + i_diagonal) * 2 * BLOCK
    if p_table is not None:
        o = tl.arange(0, BLOCK)
        below, above = diagonal_sums(acc, BLOCK)
        tl.store(p_table + partial + o, below)
        tl.store(p_table + partial + BLOCK + o, above)
    if p_query is not None:
        store_rows(dquery * scale, p_query + partial * D, 0, 2 * BLOCK, D, D, 2 * BLOCK, BLOCK_D)
    if p_key is not None:
        store_rows(dkey * scale, p_key + partial * D, 0, 2 * BLOCK, D, D, 2 * BLOCK, BLOCK_D)
    if p_value is not None:
        store_rows(dvalue * kept_scale, p_value + partial * D, 0, 2 * BLOCK, D, D, 2 * BLOCK, BLOCK_D)


@triton.jit(do_not_specialize=["n_distances", "first", "n_diagonals", "splits", "n_rows"])
def distances_sum_kernel(
    p_partial, p_out, n_distances, first, n_diagonals, splits, n_rows, Lq, W: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """out [H, n_distances, W] from partial [H, splits, n_diagonals, 2·BLOCK, W], in the order of the splits.

    A program sums one block of distances: the non-negative half of one block diagonal, the negative half of the next.
    n_rows: rows of tiles, hence the number of blocks of negative distances.
    """
    n_blocks = tl.cdiv(n_distances - Lq + 1, BLOCK) + n_rows
    h, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks - n_rows
    i_here, i_next = block - first, block + 1 - first  # where the two lie among the n_diagonals that were walked
    n_here = tl.where((i_here >= 0) & (i_here < n_diagonals), BLOCK, 0)
    n_next = tl.where((i_next >= 0) & (i_next < n_diagonals), BLOCK, 0)
    total = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    for s in range(splits):
        p = p_partial + (h * splits + s) * n_diagonals * 2 * BLOCK * W
        total += load_rows(p + (i_here * 2 + 1) * BLOCK * W, 0, n_here, W, W, BLOCK, BLOCK_W, True)
        total += load_rows(p + i_next * 2 * BLOCK * W, 0, n_next, W, W, BLOCK, BLOCK_W, True)
    o, o_w = tl.arange(0, BLOCK), tl.arange(0, BLOCK_W)
    place = block * BLOCK + o + Lq - 1
    m_place = ((place >= 0) & (place < n_distances))[:, None] & (o_w < W)[None, :]
    tl.store(
        p_out + h * n_distances * W + (place[:, None] * W + o_w[None, :]),
        cast(total, p_out.dtype.element_ty),
        mask=m_place,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bias_kernel(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_out, q_strides, k_strides, v_strides, t,
    H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale, B,
    OVER_B: tl.constexpr, OVER_H: tl.constexpr, OVER_Q: tl.constexpr, OVER_K: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out, of the bias's shape, = Σ dS over what it is broadcast over: OVER_B rows of the batch, OVER_H heads, queries,
    keys."""
    n = Numbers(H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale)
    n_i, n_j, n_h = 1 if OVER_Q else tl.cdiv(Lq, BLOCK_M), 1 if OVER_K else tl.cdiv(Lk, BLOCK_N), 1 if OVER_H else H
    i_tile, j_tile = tl.program_id(0) // n_j % n_i, tl.program_id(0) % n_j
    i_h, i_b = tl.program_id(0) // (n_j * n_i) % n_h, tl.program_id(0) // (n_j * n_i * n_h)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range((B if OVER_B else 1) * (H if OVER_H else 1)):
        b = tl.cast(step // (H if OVER_H else 1) if OVER_B else i_b, tl.int64)
        h = tl.cast(step % H if OVER_H else i_h, tl.int64)
        head, i_row = Head(b, h, key_count(t, b, Lk)), (b * H + h) * Lq
        for i_walk in range(0 if OVER_Q else i_tile, tl.cdiv(Lq, BLOCK_M) if OVER_Q else i_tile + 1):
            i0 = i_walk * BLOCK_M
            q = load_head(p_q, q_strides, b, h, i0, Lq, D, BLOCK_M, BLOCK_D)
            q_position = (
                q
                if t.q_position is None
                else load_head(t.q_position, t.q_position_strides, b, h, i0, Lq, D, BLOCK_M, BLOCK_D)
            )
            grad = load_rows(p_grad + i_row * D, i0, Lq, D, D, BLOCK_M, BLOCK_D, True)
            lse, delta = (
                load_vector(p_lse + i_row, i0, Lq, BLOCK_M, float("inf"), True),
                load_vector(p_delta + i_row, i0, Lq, BLOCK_M, 0.0, True),
            )
            begin, _, _, end = tiles_of_keys(t, head, i0, n, BLOCK_M, BLOCK_N)
            for j_walk in range(
                begin if OVER_K else tl.maximum(begin, j_tile), end if OVER_K else tl.minimum(end, j_tile + 1)
            ):
                j0 = j_walk * BLOCK_N
                k = load_head(p_k, k_strides, b, h // group, j0, head.n_keys, D, BLOCK_N, BLOCK_D)
                v = load_head(p_v, v_strides, b, h // group, j0, head.n_keys, D, BLOCK_N, BLOCK_D)
                k_position = k
                if t.k_position is not None:
                    k_position = load_head(
                        t.k_position, t.k_position_strides, b, h // group, j0, head.n_keys, D, BLOCK_N, BLOCK_D
                    )
                x = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, True, False)
                p = probabilities(x, lse[:, None], q.dtype, scale)
                acc = fma(
                    p, gradient(grad, v, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False) - delta[:, None], acc
                )
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
# Launchers


def distance_gradients(s: Saved, t: Terms, a: tuple, wanted: set[str]) -> dict[str, Tensor]:
    """Those of table [H, Lq + Lk - 1] and of the rows by distance [H, Lq + Lk - 1, D] that are wanted, summed over the
    batch."""
    names = [name for name in ("table", *VECTORS) if name in wanted]
    if not names:
        return {}
    (B, H, Lq, D), Lk = a.q.shape, a.k.shape[2]
    chosen = tiles_for("table", a)
    block = chosen.BLOCK_M
    n_rows, n_columns = triton.cdiv(Lq, block), triton.cdiv(Lk, block)
    first, n_diagonals = 1 - n_rows, n_rows + n_columns - 1
    if a.prefix is None:  # the block diagonals that hold a visible distance, numbered by column - row of their tiles
        first = max(first, triton.cdiv(a.offset - a.left - (block - 1), block))
        n_diagonals = max(0, min(n_columns, (a.offset + a.right + block - 1) // block + 1) - first)
    batch_splits, row_splits = splits_of(
        B, min(n_rows, n_columns), H * n_diagonals, len(names) == 1 and names[0] == "table"
    )
    splits = batch_splits * row_splits
    widths = {name: 1 if name == "table" else D for name in names}
    partials = {name: s.delta.new_empty(H, splits, n_diagonals, 2 * block, width) for name, width in widths.items()}
    distances_kernel[(H * n_diagonals * splits,)](
        *s, *(partials.get(name) for name in ("table", *VECTORS)), s.q.stride()[:3], s.k.stride()[:3], s.v.stride()[:3], with_bounds(t, chosen),
        *numbers(a), B, first, n_diagonals, batch_splits, row_splits, D, BLOCK=block, BLOCK_D=block_d(D), **chosen.options,
    )  # fmt: skip
    made = {}
    for name, width in widths.items():
        made[name] = torch.empty_like(getattr(a, name), memory_format=torch.contiguous_format)
        distances_sum_kernel[(H * (n_rows + n_columns),)](
            partials[name],
            made[name],
            Lq + Lk - 1,
            first,
            n_diagonals,
            splits,
            n_rows,
            Lq,
            width,
            BLOCK=block,
            BLOCK_W=triton.next_power_of_2(width),
        )
    return made


def splits_of(B: int, rows: int, programs: int, table_alone: bool) -> tuple[int, int]:
    """How many programs share a block diagonal: (over the batch, over rows of tiles).

    About 16 tiles for each on the longest one, but no more than fill a GPU, since every one writes partial sums of its
    own."""
    enough = triton.cdiv(4096 if table_alone else 1024, max(1, programs))
    splits = max(1, min(16, B * rows // 16, enough))
    batch_splits = max(1, min(B, splits))
    return batch_splits, splits // batch_splits


def bias_gradient(s: Saved, t: Terms, a: tuple) -> Tensor:
    """Σ dS over what the bias is broadcast over, in the bias's shape and dtype."""
    (B, _, Lq, D), Lk = a.q.shape, a.k.shape[2]
    chosen = tiles_for("bias", a)
    of_batch, of_heads, of_queries, of_keys = a.bias.shape
    programs = (
        of_batch
        * of_heads
        * (1 if of_queries == 1 else triton.cdiv(Lq, chosen.BLOCK_M))
        * (1 if of_keys == 1 else triton.cdiv(Lk, chosen.BLOCK_N))
    )
    out = torch.empty_like(a.bias, memory_format=torch.contiguous_format)
    bias_kernel[(programs,)](
        *s, out, s.q.stride()[:3], s.k.stride()[:3], s.v.stride()[:3], with_bounds(t, chosen), *numbers(a), B,
        of_batch == 1, of_heads == 1, of_queries == 1, of_keys == 1, D, BLOCK_D=block_d(D), **chosen._asdict(),
    )  # fmt: skip
    return out

"""The gradient of flash attention: three walks over the tiles, none of which needs an atomic, so that it repeats bit for bit.

    dq      a program owns queries and walks keys; it leaves δ[i] = ⟨grad[i], out[i]⟩ and lse in its unit to the others
    dk, dv  a program owns keys of a key/value head and walks the queries of every query head that shares it
    dtable  a program owns a block diagonal, where every tile holds the same distances at the same places: it adds
            dS tile upon tile in registers, and sums the diagonals once, at the end

Every walk recomputes P = exp(score - lse) and dS = P ∘ (grad vᵀ - δ). Rows past the end and rows that see nothing have
lse = +inf here, hence P = 0 without a mask. Shapes and meanings: fastlm/ops/attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.attention import key_count, product, scores, units
from fastlm.kernels.tile import LOG2E, architecture, cast, dot, edge_tile, fma, load_rows, look_up, rows, store_rows, tiles_in_band, with_margins
from fastlm.kernels.tiles import block_d, tiles

# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def load_vector(p, i0, Lq, BLOCK: tl.constexpr, other: tl.constexpr, EDGE: tl.constexpr):
    """Elements i0 … i0 + BLOCK - 1 of the fp32 vector [Lq] at p. EDGE: some may lie past its end, and are `other`."""
    o_i = tl.arange(0, BLOCK)
    if EDGE:
        return tl.where(o_i < Lq - i0, look_up(p + i0 + tl.minimum(o_i, Lq - 1 - i0)), other)
    return look_up(p + i0 + o_i)


@triton.jit
def exponential(x, lse, dtype: tl.constexpr, scale):
    """P from scores and lse in the unit of their dtype."""
    to_unit, to_log2 = units(dtype, scale)
    return tl.exp2(fma(x, to_unit, -lse) * to_log2)


@triton.jit
def dq_tile(
    dq, q, grad, lse, delta, p_k, p_v, p_table, tile, i0, Lq, n_keys, left, right, offset, scale, stride_k, stride_v,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dq [M, D] += dS k over one tile of keys."""
    j0 = tile * BLOCK_N
    o_i, o_j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    k = load_rows(p_k, j0, n_keys, stride_k, D, BLOCK_N, BLOCK_D, EDGE)
    v = load_rows(p_v, j0, n_keys, stride_v, D, BLOCK_N, BLOCK_D, EDGE)
    x = scores(q, k.T, p_table, o_i, o_j, i0, j0, Lq, n_keys, left, right, offset, scale, EDGE)
    p = exponential(x, lse[:, None], q.dtype, scale)
    ds = p * (dot(grad, v.T) - delta[:, None])
    return dot(cast(ds, k.dtype), k, dq)


@triton.jit
def dkdv_tile(
    dk, dv, k, v, p_q, p_grad, p_lse, p_delta, p_table, tile, j0, Lq, n_keys, left, right, offset, scale, stride_q,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dv [N, D] += Pᵀ grad and dk [N, D] += dSᵀ q over one tile of queries; everything is held keys × queries."""
    i0 = tile * BLOCK_M
    o_i, o_j = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
    q = load_rows(p_q, i0, Lq, stride_q, D, BLOCK_M, BLOCK_D, EDGE)
    grad = load_rows(p_grad, i0, Lq, D, D, BLOCK_M, BLOCK_D, EDGE)
    x = scores(k, q.T, p_table, o_i, o_j, i0, j0, Lq, n_keys, left, right, offset, scale, EDGE)
    p = exponential(x, load_vector(p_lse, i0, Lq, BLOCK_M, float("inf"), EDGE)[None, :], q.dtype, scale)
    dv = dot(cast(p, grad.dtype), grad, dv)
    ds = p * (dot(v, grad.T) - load_vector(p_delta, i0, Lq, BLOCK_M, 0.0, EDGE)[None, :])
    return dot(cast(ds, q.dtype), q, dk), dv


@triton.jit
def ds_tile(
    acc, bias, p_q, p_k, p_v, p_grad, p_lse, p_delta, tile, diagonal, Lq, n_keys, scale, stride_q, stride_k, stride_v,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK, BLOCK] += dS of the tile in row `tile` of a block diagonal; bias carries the table and the band."""
    i0, j0 = tile * BLOCK, (tile + diagonal) * BLOCK
    q = load_rows(p_q, i0, Lq, stride_q, D, BLOCK, BLOCK_D, EDGE)
    k = load_rows(p_k, j0, n_keys, stride_k, D, BLOCK, BLOCK_D, EDGE)
    grad = load_rows(p_grad, i0, Lq, D, D, BLOCK, BLOCK_D, EDGE)
    v = load_rows(p_v, j0, n_keys, stride_v, D, BLOCK, BLOCK_D, EDGE)
    x = product(q, k.T, bias, scale)
    if EDGE:
        x = tl.where((tl.arange(0, BLOCK) < n_keys - j0)[None, :], x, float("-inf"))
    p = exponential(x, load_vector(p_lse, i0, Lq, BLOCK, float("inf"), EDGE)[:, None], q.dtype, scale)
    return fma(p, dot(grad, v.T) - load_vector(p_delta, i0, Lq, BLOCK, 0.0, EDGE)[:, None], acc)


@triton.jit
def diagonal_sums(x, BLOCK: tl.constexpr):
    """x [BLOCK, BLOCK] → (sums at column - row = 0 … BLOCK - 1, sums at column - row = -BLOCK … -1), each [BLOCK].

    Turning row i left by i places brings each diagonal into one column: the part that did not wrap around, and the part
    that did.
    """
    o_i, o_j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    turned = tl.gather(x, (o_i + o_j) % BLOCK, axis=1)
    straight = o_i + o_j < BLOCK
    return tl.sum(tl.where(straight, turned, 0.0), 0), tl.sum(tl.where(straight, 0.0, turned), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=["Lq", "Lk", "left", "right", "offset"])
def dq_kernel(
    p_q, p_k, p_v, p_table, p_lengths, p_grad, p_grad_lse, p_out, p_lse, p_lse_unit, p_delta, p_dq, q_strides, k_strides, v_strides,
    table_stride, H, group, Lq, Lk, left, right, offset, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    b, h = i_bh // H, i_bh % H
    p_k += b * k_strides[0] + h // group * k_strides[1]
    p_v += b * v_strides[0] + h // group * v_strides[1]
    if p_table is not None:
        p_table += h * table_stride
    n_keys = key_count(p_lengths, b, Lk)

    q = load_rows(p_q + b * q_strides[0] + h * q_strides[1], i0, Lq, q_strides[2], D, BLOCK_M, BLOCK_D, True)
    grad = load_rows(p_grad + i_bh * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D, True)
    out = load_rows(p_out + i_bh * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if p_grad_lse is not None:
        delta -= load_vector(p_grad_lse + i_bh * Lq, i0, Lq, BLOCK_M, 0.0, True)
    lse = load_vector(p_lse + i_bh * Lq, i0, Lq, BLOCK_M, float("inf"), True)
    to_unit, to_log2 = units(q.dtype, scale)
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * (LOG2E / to_log2)
    o_i = tl.arange(0, BLOCK_M)
    tl.store(p_delta + i_bh * Lq + i0 + o_i, delta, mask=o_i < Lq - i0)
    tl.store(p_lse_unit + i_bh * Lq + i0 + o_i, lse, mask=o_i < Lq - i0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum(i0 + BLOCK_M, Lq) - 1
    begin, full_begin, full_end, end = tiles_in_band(i0 + offset, last + offset, left, right, n_keys, BLOCK_N)
    for tile in tl.range(full_begin, full_end, disable_licm=True):
        dq = dq_tile(
            dq, q, grad, lse, delta, p_k, p_v, p_table, tile, i0, Lq, n_keys, left, right, offset, scale, k_strides[2], v_strides[2],
            D, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for t in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
        dq = dq_tile(
            dq, q, grad, lse, delta, p_k, p_v, p_table, edge_tile(t, begin, full_begin, full_end), i0, Lq, n_keys, left, right, offset, scale,
            k_strides[2], v_strides[2], D, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    store_rows(dq * scale, p_dq + i_bh * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["Lq", "Lk", "left", "right", "offset"])
def dkdv_kernel(
    p_q, p_k, p_v, p_table, p_lengths, p_grad, p_lse, p_delta, p_dk, p_dv, q_strides, k_strides, v_strides,
    table_stride, Hk, group, Lq, Lk, left, right, offset, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(Lk, BLOCK_N)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    j0 = tl.program_id(0) % n_tiles * BLOCK_N  # under a causal mask the first keys have most to do
    b, h_k = i_bh // Hk, i_bh % Hk
    n_keys = key_count(p_lengths, b, Lk)

    k = load_rows(p_k + b * k_strides[0] + h_k * k_strides[1], j0, n_keys, k_strides[2], D, BLOCK_N, BLOCK_D, True)
    v = load_rows(p_v + b * v_strides[0] + h_k * v_strides[1], j0, n_keys, v_strides[2], D, BLOCK_N, BLOCK_D, True)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    n_rows = tl.where(j0 < n_keys, Lq, 0)
    last = tl.minimum(j0 + BLOCK_N, n_keys) - 1
    begin, full_begin, full_end, end = tiles_in_band(j0 - offset, last - offset, right, left, n_rows, BLOCK_M)
    for h in range(h_k * group, (h_k + 1) * group):
        i_row = (b * Hk * group + h) * Lq
        p_bias = None if p_table is None else p_table + h * table_stride
        p_qh = p_q + b * q_strides[0] + h * q_strides[1]
        for tile in tl.range(full_begin, full_end, disable_licm=True):
            dk, dv = dkdv_tile(
                dk, dv, k, v, p_qh, p_grad + i_row * D, p_lse + i_row, p_delta + i_row, p_bias, tile, j0, Lq, n_keys, left, right, offset, scale,
                q_strides[2], D, BLOCK_M, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
        for t in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
            dk, dv = dkdv_tile(
                dk, dv, k, v, p_qh, p_grad + i_row * D, p_lse + i_row, p_delta + i_row, p_bias, edge_tile(t, begin, full_begin, full_end),
                j0, Lq, n_keys, left, right, offset, scale, q_strides[2], D, BLOCK_M, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
    m_j = (tl.arange(0, BLOCK_N) < n_keys - j0)[:, None]  # keys that do not exist were never masked: no other row saw them
    store_rows(tl.where(m_j, dk * scale, 0.0), p_dk + i_bh * Lk * D, j0, Lk, D, D, BLOCK_N, BLOCK_D)
    store_rows(tl.where(m_j, dv, 0.0), p_dv + i_bh * Lk * D, j0, Lk, D, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["Lq", "Lk", "left", "right", "offset", "first"])
def dtable_kernel(
    p_q, p_k, p_v, p_table, p_lengths, p_grad, p_lse, p_delta, p_partial, q_strides, k_strides, v_strides,
    table_stride, B, H, group, Lq, Lk, left, right, offset, scale, first, n_diagonals, batch_splits, row_splits,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial [H, splits, diagonals, 2, BLOCK] = the two halves of diagonal_sums of Σ dS over this program's tiles."""
    split = tl.program_id(0) % (batch_splits * row_splits)
    i_diagonal = tl.program_id(0) // (batch_splits * row_splits) % n_diagonals
    h = (tl.program_id(0) // (batch_splits * row_splits * n_diagonals)).to(tl.int64)
    diagonal = first + i_diagonal
    begin = tl.maximum(-diagonal, 0) + split // batch_splits  # the program's first row of tiles

    o_d = tl.arange(0, BLOCK)[None, :] - tl.arange(0, BLOCK)[:, None] + diagonal * BLOCK
    bias = look_up(p_table + h * table_stride + (Lq - 1) + o_d)
    bias = tl.where((o_d - offset >= -left) & (o_d - offset <= right), bias, float("-inf"))
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for b_ in range(split % batch_splits, B, batch_splits):
        b = tl.cast(b_, tl.int64)
        n_keys = key_count(p_lengths, b, Lk)
        full_end = tl.maximum(tl.minimum(Lq // BLOCK, tl.maximum(n_keys, 0) // BLOCK - diagonal), begin)
        end = tl.minimum(tl.cdiv(Lq, BLOCK), tl.cdiv(tl.maximum(n_keys, 0), BLOCK) - diagonal)
        i_row = (b * H + h) * Lq
        p_qh = p_q + b * q_strides[0] + h * q_strides[1]
        p_kh = p_k + b * k_strides[0] + h // group * k_strides[1]
        p_vh = p_v + b * v_strides[0] + h // group * v_strides[1]
        for tile in tl.range(begin, full_end, row_splits, disable_licm=True):
            acc = ds_tile(
                acc, bias, p_qh, p_kh, p_vh, p_grad + i_row * D, p_lse + i_row, p_delta + i_row, tile, diagonal, Lq, n_keys, scale,
                q_strides[2], k_strides[2], v_strides[2], D, BLOCK, BLOCK_D, False,
            )  # fmt: skip
        for tile in tl.range(begin + tl.cdiv(full_end - begin, row_splits) * row_splits, end, row_splits, disable_licm=True):
            acc = ds_tile(
                acc, bias, p_qh, p_kh, p_vh, p_grad + i_row * D, p_lse + i_row, p_delta + i_row, tile, diagonal, Lq, n_keys, scale,
                q_strides[2], k_strides[2], v_strides[2], D, BLOCK, BLOCK_D, True,
            )  # fmt: skip
    above, below = diagonal_sums(acc, BLOCK)
    o = tl.arange(0, BLOCK)
    p_partial += ((h * batch_splits * row_splits + split) * n_diagonals + i_diagonal) * 2 * BLOCK
    tl.store(p_partial + o, above)
    tl.store(p_partial + BLOCK + o, below)


@triton.jit(do_not_specialize=["n_distances", "first", "n_diagonals", "splits", "n_rows"])
def dtable_sum_kernel(p_partial, p_dtable, n_distances, first, n_diagonals, splits, n_rows, Lq, BLOCK: tl.constexpr):
    """dtable [H, n_distances] from partial [H, splits, n_diagonals, 2, BLOCK], in the order of the splits.

    A program sums one block of distances: the non-negative half of one block diagonal, the negative half of the next.
    n_rows: rows of tiles, hence the number of blocks of negative distances.
    """
    n_blocks = tl.cdiv(n_distances - Lq + 1, BLOCK) + n_rows
    h, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks - n_rows
    o = tl.arange(0, BLOCK)
    o_here = (block - first) * BLOCK + o  # where the block's own diagonal lies among the n_diagonals that were walked
    m_here, m_next = (o_here >= 0) & (o_here < n_diagonals * BLOCK), (o_here >= -BLOCK) & (o_here < (n_diagonals - 1) * BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(splits):
        p = p_partial + ((h * splits + s) * n_diagonals + block - first) * 2 * BLOCK + o
        total += tl.load(p, mask=m_here, other=0.0) + tl.load(p + 3 * BLOCK, mask=m_next, other=0.0)
    place = block * BLOCK + o + Lq - 1
    tl.store(p_dtable + h * n_distances + place, total, mask=(place >= 0) & (place < n_distances))


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def backward(grad, grad_lse, out, lse, q, k, v, table, key_lengths, left, right, scale, offset, table_wanted) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dtable or None) of the op `attention_backward`, whose arguments these are; the rest of them are absent."""
    (B, H, Lq, D), (Hk, Lk) = q.shape, k.shape[1:3]
    q, k, v, grad, out = rows(q), rows(k), rows(v), grad.contiguous(), out.contiguous()
    table, table_stride = with_margins(table, Lq, Lk)
    grad_lse, key_lengths = (None if x is None else x.contiguous() for x in (grad_lse, key_lengths))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    lse_unit, delta = torch.empty_like(lse), torch.empty_like(lse)
    strides = q.stride()[:3], k.stride()[:3], v.stride()[:3], table_stride
    band = Lq, Lk, left, right, offset, scale
    with torch.cuda.device_of(q):
        chosen = tiles("dq", D, q.dtype, architecture())
        dq_kernel[(triton.cdiv(Lq, chosen.BLOCK_M) * H * B,)](
            q, k, v, table, key_lengths, grad, grad_lse, out, lse, lse_unit, delta, dq, *strides, H, H // Hk, *band,
            D, BLOCK_D=block_d(D), **chosen._asdict(),
        )  # fmt: skip
        chosen = tiles("dkdv", D, q.dtype, architecture())
        dkdv_kernel[(triton.cdiv(Lk, chosen.BLOCK_N) * Hk * B,)](
            q, k, v, table, key_lengths, grad, lse_unit, delta, dk, dv, *strides, Hk, H // Hk, *band, D, BLOCK_D=block_d(D), **chosen._asdict()
        )
        dtable = table_gradient(grad, lse_unit, delta, q, k, v, table, table_stride, key_lengths, *band) if table_wanted else None
    return dq, dk, dv, dtable


def table_gradient(grad, lse_unit, delta, q, k, v, table, table_stride, key_lengths, Lq, Lk, left, right, offset, scale) -> Tensor:
    """Σ dS over the batch and along each diagonal [H, Lq + Lk - 1]: partial sums of block diagonals, then their sum."""
    (B, H, _, D), Hk = q.shape, k.shape[1]
    chosen = tiles("dtable", D, q.dtype, architecture())
    block = chosen.BLOCK_M
    n_rows, n_columns = triton.cdiv(Lq, block), triton.cdiv(Lk, block)
    # The block diagonals that hold a visible distance, numbered by column - row of their tiles.
    first = max(1 - n_rows, triton.cdiv(offset - left - (block - 1), block))
    n_diagonals = max(0, min(n_columns, (offset + right + block - 1) // block + 1) - first)
    batch_splits, row_splits = dtable_splits(B, min(n_rows, n_columns))
    splits = batch_splits * row_splits
    partial, dtable = delta.new_empty(H, splits, n_diagonals, 2, block), delta.new_empty(H, Lq + Lk - 1)
    dtable_kernel[(H * n_diagonals * splits,)](
        q, k, v, table, key_lengths, grad, lse_unit, delta, partial, q.stride()[:3], k.stride()[:3], v.stride()[:3], table_stride,
        B, H, H // Hk, Lq, Lk, left, right, offset, scale, first, n_diagonals, batch_splits, row_splits,
        D, BLOCK=block, BLOCK_D=block_d(D), **chosen.options,
    )  # fmt: skip
    dtable_sum_kernel[(H * (n_rows + n_columns),)](partial, dtable, Lq + Lk - 1, first, n_diagonals, splits, n_rows, Lq, BLOCK=block)
    return dtable


def dtable_splits(B: int, rows: int) -> tuple[int, int]:
    """(over the batch, over rows of tiles): about 16 tiles for a program on the longest block diagonal, at most 16 splits."""
    splits = max(1, min(16, B * rows // 16))
    batch_splits = max(1, min(B, splits))
    return batch_splits, splits // batch_splits

"""Attention of few queries with many keys, as when a model decodes: programs share the keys of a head, and what each
made of its share is put together by log-sum-exp ("Flash-Decoding", Dao et al. 2023).

A tile's rows are the queries of all heads that share a key/value head, so that keys and values are read once for the
group. Every term and mask is served but rows by distance, which lie on a slant that takes square tiles: such calls go
the way of many queries (kernels/attention.py). Shares depend on sizes alone, and sums have one order: the bits repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import VECTORS, launch, numbers, signature, strided, terms, tiles_for, with_bounds
from fastlm.kernels.masks import edge_tile, key_count, tiles_of_keys
from fastlm.kernels.online_softmax import NOTHING, finished, forward_tile
from fastlm.kernels.terms import UNSPECIALIZED, Head, Numbers
from fastlm.kernels.tile import cast, head_of
from fastlm.kernels.tiles import LARGEST, Tiles, block_d, cdiv, power_of_two

LEAST_KEYS = 512  # fewer are walked as soon as put together
LEAST_TILES = 4  # of keys in a share, for a pipeline of loads to run
MOST_SPLITS = 32  # put together at once
ENOUGH = 264  # programs: two for each multiprocessor of an H100

# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "splits"])
def split_kernel(
    q_rows, k_rows, v_rows, p_out, p_lse, t,
    H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale,
    splits, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, H, Lq, splits, D] and lse [B, H, Lq, splits], fp32, of every share of the keys."""
    n = Numbers(
        H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale
    )
    split, i_bh = tl.program_id(0) % splits, (tl.program_id(0) // splits).to(tl.int64)
    b, h_k = i_bh // (H // group), i_bh % (H // group)
    # rows of the tile: queries of one head after the other; past the last head they are that one's again
    o_row, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    h, o_i = h_k * group + tl.minimum(o_row // Lq, group - 1), o_row % Lq
    head = Head(b, h[:, None], key_count(t, b, Lk), o_i[:, None])
    p_q = q_rows.p + (b * q_rows.strides[0] + h * q_rows.strides[1] + o_i.to(tl.int64) * q_rows.strides[2])
    q = tl.load(p_q[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
    keys, values = head_of(k_rows, b, h_k), head_of(v_rows, b, h_k)

    # this program's share of the tiles that some of them see: full ones, then the edges, as ever
    begin, full_begin, full_end, end = tiles_of_keys(t, head, 0, n, BLOCK_M, BLOCK_N)
    share = tl.cdiv(end - begin, splits)
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, l = tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(full_begin, full_end, disable_licm=True):
        acc, m, l = forward_tile(
            q, q, acc, m, l, keys, values, None, t, head, 0, tile, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False
        )  # fmt: skip
    for step in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
        acc, m, l = forward_tile(
            q, q, acc, m, l, keys, values, None, t, head, 0, edge_tile(step, begin, full_begin, full_end), n,
            D, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip

    out, lse = finished(acc, m, l, q.dtype, n)
    place, m_row = ((b * H + h) * Lq + o_i) * splits + split, o_row < group * Lq
    tl.store(p_lse + place, lse, mask=m_row)
    tl.store(p_out + (place[:, None] * D + o_d[None, :]), out, mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    p_parts, p_part_lse, p_out, p_lse, splits, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A row of out and lse, a program each, from its parts [splits, D] and theirs: L = ln Σ exp L_s, O = Σ exp(L_s - L)
    O_s; where no part saw a key, zeros and -∞.
    """
    row, o_s, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    part_lse = tl.load(p_part_lse + row * splits + o_s, mask=o_s < splits, other=float("-inf"))
    largest = tl.max(part_lse, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp(part_lse - largest)
    total = tl.sum(weight, 0)
    seen = tl.where(total == 0, 1.0, total)
    p_part = p_parts + row * splits * D + (o_s[:, None] * D + o_d[None, :])
    parts = tl.load(p_part, mask=(o_s < splits)[:, None] & (o_d < D)[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / seen
    tl.store(p_out + row * D + o_d, cast(out, p_out.dtype.element_ty), mask=o_d < D)
    tl.store(p_lse + row, tl.where(total == 0, float("-inf"), largest + tl.log(seen)))


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def has_few_queries(a: tuple) -> bool:
    """Whether the queries of the heads that share a key head fit one tile, and keys are many; without rows by
    distance.
    """
    (_, H, Lq, _), (Hk, Lk) = a.q.shape, a.k.shape[1:3]
    rows = Lq * (H // Hk)
    if not 0 < rows <= LARGEST or Lk < LEAST_KEYS or any(getattr(a, name) is not None for name in VECTORS):
        return False
    return rows <= tiles_for("split", a).BLOCK_M


def key_splits(heads: int, tiles: int) -> int:
    """How many programs share the tiles of keys of each of so many heads: as many as fill a GPU."""
    return max(1, min(MOST_SPLITS, tiles // LEAST_TILES, cdiv(ENOUGH, max(heads, 1))))


def decode(a: tuple) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op `attention` for a call that `has_few_queries`."""
    (B, H, Lq, D), (Hk, Lk) = a.q.shape, a.k.shape[1:3]
    q, k, v = strided(a.q), strided(a.k), strided(a.v)
    out, lse = a.q.new_empty(a.q.shape), a.q.new_empty(B, H, Lq, dtype=torch.float32)
    chosen = tiles_for("split", a)
    chosen = chosen._replace(BLOCK_M=max(16, power_of_two(Lq * (H // Hk))))
    splits = key_splits(B * Hk, cdiv(Lk, chosen.BLOCK_N))
    parts = a.q.new_empty(B, H, Lq, splits, D, dtype=torch.float32)
    part_lse = parts.new_empty(B, H, Lq, splits)
    seen = signature(a)
    launch(
        split_kernel, B * Hk * splits, chosen, seen,
        q, k, v, parts, part_lse, with_bounds(terms(a), chosen), *numbers(a), splits,
        D, chosen.BLOCK_M, chosen.BLOCK_N, block_d(D),
    )  # fmt: skip
    launch(
        merge_kernel, B * H * Lq, Tiles(MOST_SPLITS, 1, 4, 1), seen,
        parts, part_lse, out, lse, splits, D, MOST_SPLITS, block_d(D),
    )  # fmt: skip
    return out, lse

"""Flash attention with every positional term and mask: one pass over the keys with a running softmax (Dao et al. 2022;
Milakov & Gimelshein 2018; lines of algorithms are those of FlashAttention-2, Dao 2023).

A program owns BLOCK_M queries of one head and walks the tiles of keys that they see: first the full tiles, without any
mask arithmetic, then the edges. Few queries of long rows: kernels/decoding.py. What is added to scores and what is
hidden: kernels/terms.py, kernels/masks.py. Shapes and meanings: fastlm/ops/attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.decoding import decode, has_few_queries
from fastlm.kernels.launch import launch, numbers, signature, strided, terms, tiles_for, with_bounds
from fastlm.kernels.masks import edge_tile, key_count, tiles_of_keys
from fastlm.kernels.online_softmax import NOTHING, finished, forward_tile
from fastlm.kernels.terms import UNSPECIALIZED, Head, Numbers
from fastlm.kernels.tile import head_of, load_position, load_rows, store_rows
from fastlm.kernels.tiles import block_d, cdiv

# ---------------------------------------------------------------------------------------------------------------------
# Kernel


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_rows, k_rows, v_rows, p_out, p_lse, t,
    H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = Numbers(
        H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale
    )
    # which queries of which head; under a causal mask the last ones have most to do, so they begin
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = tl.program_id(0) // n_tiles
    i0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    b, h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    head = Head(b, h, key_count(t, b, Lk), None)
    keys, values = head_of(k_rows, b, h // group), head_of(v_rows, b, h // group)
    key_positions = None if t.k_position is None else head_of(t.k_position, b, h // group)
    query_positions = None if t.q_position is None else head_of(t.q_position, b, h)

    # queries stay in registers, with nothing summed yet (algorithm 1, lines 4 and 5)
    q = load_rows(head_of(q_rows, b, h), i0, Lq, D, BLOCK_M, BLOCK_D, True)
    q_position = load_position(query_positions, q, i0, Lq, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, l = tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    # full tiles, then the edges on both sides of them
    begin, full_begin, full_end, end = tiles_of_keys(t, head, i0, n, BLOCK_M, BLOCK_N)
    for tile in tl.range(full_begin, full_end, disable_licm=True):
        acc, m, l = forward_tile(
            q, q_position, acc, m, l, keys, values, key_positions, t, head, i0, tile, n,
            D, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for step in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
        acc, m, l = forward_tile(
            q, q_position, acc, m, l, keys, values, key_positions, t, head, i0,
            edge_tile(step, begin, full_begin, full_end), n, D, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip

    out, lse = finished(acc, m, l, q.dtype, n)
    store_rows(out, p_out + i_bh.to(tl.int64) * Lq * D, i0, Lq, D, BLOCK_M, BLOCK_D)
    o_i = tl.arange(0, BLOCK_M)
    tl.store(p_lse + i_bh.to(tl.int64) * Lq + i0 + o_i, lse, mask=o_i < Lq - i0)


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def forward(a: tuple) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op `attention`."""
    with torch.cuda.device_of(a.q):
        return decode(a) if has_few_queries(a) else _forward(a)


def _forward(a: tuple) -> tuple[Tensor, Tensor]:
    B, H, Lq, D = a.q.shape
    q, k, v = strided(a.q), strided(a.k), strided(a.v)
    out, lse = a.q.new_empty(a.q.shape), a.q.new_empty(B, H, Lq, dtype=torch.float32)
    chosen = tiles_for("forward", a)
    t = with_bounds(terms(a), chosen)
    launch(
        forward_kernel, cdiv(Lq, chosen.BLOCK_M) * H * B, chosen, signature(a),
        q, k, v, out, lse, t, *numbers(a), D, chosen.BLOCK_M, chosen.BLOCK_N, block_d(D),
    )  # fmt: skip
    return out, lse

"""The gradient of flash attention: walks over the tiles, none of which needs an atomic, so that it repeats bit for bit.

    dq        a program owns queries and walks keys; it leaves δ[i] = ⟨grad[i], out[i]⟩ and lse in its unit to all else
    dk, dv    a program owns keys of a key/value head and walks the queries of every query head that shares it
    table, vectors, bias    kernels/distance_gradients.py, kernels/bias_gradient.py

A bias with one element for all keys of a query, or all queries of a key, has Σ dS of its row for gradient, which the
walks above have in hand.

Every walk recomputes P = exp(score - lse) and dS = P ∘ (dP - δ), and with a softcap dX = dS ∘ cap'. Rows past the end
and rows that see nothing have lse = +inf here, hence P = 0 without a mask. Lines of algorithms are those of
FlashAttention-2 (Dao 2023). Shapes and meanings: fastlm/ops/attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.bias_gradient import bias_gradient, sums_of_rows
from fastlm.kernels.distance_gradients import distance_gradients
from fastlm.kernels.launch import Saved, launch, numbers, signature, strided, terms, tiles_for, with_bounds
from fastlm.kernels.masks import edge_tile, key_count, tiles_of_keys, tiles_of_queries
from fastlm.kernels.rows_by_distance import by_distance, distance_rows
from fastlm.kernels.terms import (
    UNSPECIALIZED,
    Head,
    Numbers,
    apply_dropout,
    probabilities,
    probability_gradient,
    same_group,
    scores,
    under_cap,
    units,
)
from fastlm.kernels.tile import (
    LOG2E,
    Matrix,
    cast,
    dot,
    head_of,
    load_position,
    load_rows,
    load_vector,
    places,
    store_rows,
)
from fastlm.kernels.tiles import block_d, cdiv

# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def dq_tile(
    dq, dq_position, dsame, dbias, q, q_position, grad, lse, delta, keys, values, key_positions, t, head, i0, tile, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dq [M, D] += dS k over one tile of keys, and its share of the other gradients that queries own."""
    j0 = tile * BLOCK_N
    k = load_rows(keys, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
    v = load_rows(values, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
    k_position = load_position(key_positions, k, j0, head.n_keys, D, BLOCK_N, BLOCK_D, EDGE)
    # P once more from S and L, dP from the output's gradient, dS = P ∘ (dP - δ) (algorithm 2, lines 10 to 14)
    x, slope = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, EDGE, False)
    p = probabilities(x, lse[:, None], q.dtype, n)
    dp = probability_gradient(grad, v, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False)
    ds = p * (dp - delta[:, None])
    # dS is the gradient of what was added to S as it is
    if dbias.numel > 1:
        dbias += tl.sum(ds, 1)
    if t.same is not None:
        o_i, o_j = places(BLOCK_M, BLOCK_N, False)
        dsame += tl.sum(tl.where(same_group(t, head, i0, j0, o_i, o_j, n), ds, 0.0), 1)
    # and under the cap times k, or the vectors of each distance, of what met these (line 15)
    ds = cast(under_cap(ds, slope, n), k.dtype)
    dq = dot(ds, k, dq)
    if t.query_vectors is not None:
        ds = by_distance(ds, BLOCK_M, False, False)
        vectors = distance_rows(t.query_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D)
        if t.q_position is None:
            dq = dot(ds, vectors, dq)
        else:
            dq_position = dot(ds, vectors, dq_position)
    return dq, dq_position, dsame, dbias


@triton.jit
def dkdv_tile(
    dk, dv, dk_position, dbias, k, v, k_position, queries, query_positions, grads, p_lse, p_delta, t, head, tile, j0, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dv [N, D] += P̂ᵀ grad and dk [N, D] += dSᵀ q over one tile of queries; everything is held keys × queries."""
    i0 = tile * BLOCK_M
    q = load_rows(queries, i0, n.Lq, D, BLOCK_M, BLOCK_D, EDGE)
    q_position = load_position(query_positions, q, i0, n.Lq, D, BLOCK_M, BLOCK_D, EDGE)
    grad = load_rows(grads, i0, n.Lq, D, BLOCK_M, BLOCK_D, EDGE)
    # Pᵀ once more from S and L; what was dropped carries nothing to v (algorithm 2, lines 10 to 12)
    x, slope = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, EDGE, True)
    p = probabilities(x, load_vector(p_lse, i0, n.Lq, BLOCK_M, float("inf"), EDGE)[None, :], q.dtype, n)
    dv = dot(cast(apply_dropout(p, head, i0, j0, n, BLOCK_M, BLOCK_N, True), grad.dtype), grad, dv)
    # dSᵀ = Pᵀ ∘ (dPᵀ - δ), and dk += dSᵀ q (lines 13, 14 and 16)
    dp = probability_gradient(grad, v, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, True)
    ds = p * (dp - load_vector(p_delta, i0, n.Lq, BLOCK_M, 0.0, EDGE)[None, :])
    if dbias.numel > 1:
        dbias += tl.sum(ds, 1)
    ds = cast(under_cap(ds, slope, n), q.dtype)
    dk = dot(ds, q, dk)
    if t.key_vectors is not None:
        ds = by_distance(ds, BLOCK_N, True, True)
        vectors = distance_rows(t.key_vectors, head, i0, j0, n, D, BLOCK_N, BLOCK_D)
        if t.k_position is None:
            dk = dot(ds, vectors, dk)
        else:
            dk_position = dot(ds, vectors, dk_position)
    return dk, dv, dk_position, dbias


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq_kernel(
    q_rows, k_rows, v_rows, grad_rows, p_grad_lse, p_out, p_lse, p_lse_unit, p_delta, p_dq, p_dq_position, p_dsame,
    p_dbias, t,
    H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = Numbers(
        H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale
    )
    # which queries of which head, in the order of the forward pass
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    b, h = i_bh // H, i_bh % H
    head = Head(b, h, key_count(t, b, Lk), None)
    keys, values = head_of(k_rows, b, h // group), head_of(v_rows, b, h // group)
    key_positions = None if t.k_position is None else head_of(t.k_position, b, h // group)
    query_positions = None if t.q_position is None else head_of(t.q_position, b, h)

    q = load_rows(head_of(q_rows, b, h), i0, Lq, D, BLOCK_M, BLOCK_D, True)
    q_position = load_position(query_positions, q, i0, Lq, D, BLOCK_M, BLOCK_D, True)
    # δ = rowsum(dO ∘ O), less the gradient of L itself (algorithm 2, line 4)
    grad = load_rows(head_of(grad_rows, b, h), i0, Lq, D, BLOCK_M, BLOCK_D, True)
    out = load_rows(Matrix(p_out + i_bh * Lq * D, D), i0, Lq, D, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if p_grad_lse is not None:
        delta -= load_vector(p_grad_lse + i_bh * Lq, i0, Lq, BLOCK_M, 0.0, True)
    # L in the unit of scores; rows that saw nothing have L = +∞ from here on
    lse = load_vector(p_lse + i_bh * Lq, i0, Lq, BLOCK_M, float("inf"), True)
    _, to_log2 = units(q.dtype, n)
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * (LOG2E / to_log2)
    # both for the kernels after this one
    o_i = tl.arange(0, BLOCK_M)
    tl.store(p_delta + i_bh * Lq + i0 + o_i, delta, mask=o_i < Lq - i0)
    tl.store(p_lse_unit + i_bh * Lq + i0 + o_i, lse, mask=o_i < Lq - i0)

    # full tiles of keys, then the edges; [1, 1] is a gradient nobody asked for
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq_position = tl.zeros([1, 1] if t.q_position is None else [BLOCK_M, BLOCK_D], tl.float32)
    dsame = tl.zeros([1] if t.same is None else [BLOCK_M], tl.float32)
    dbias = tl.zeros([1] if p_dbias is None else [BLOCK_M], tl.float32)
    begin, full_begin, full_end, end = tiles_of_keys(t, head, i0, n, BLOCK_M, BLOCK_N)
    for tile in tl.range(full_begin, full_end, disable_licm=True):
        dq, dq_position, dsame, dbias = dq_tile(
            dq, dq_position, dsame, dbias, q, q_position, grad, lse, delta, keys, values, key_positions, t, head, i0,
            tile, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for step in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
        dq, dq_position, dsame, dbias = dq_tile(
            dq, dq_position, dsame, dbias, q, q_position, grad, lse, delta, keys, values, key_positions, t, head, i0,
            edge_tile(step, begin, full_begin, full_end), n, D, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    store_rows(dq * scale, p_dq + i_bh * Lq * D, i0, Lq, D, BLOCK_M, BLOCK_D)
    if t.q_position is not None:
        store_rows(dq_position * scale, p_dq_position + i_bh * Lq * D, i0, Lq, D, BLOCK_M, BLOCK_D)
    if t.same is not None:
        tl.store(p_dsame + i_bh * Lq + i0 + o_i, dsame, mask=o_i < Lq - i0)
    if p_dbias is not None:
        tl.store(p_dbias + i_bh * Lq + i0 + o_i, dbias, mask=o_i < Lq - i0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv_kernel(
    q_rows, k_rows, v_rows, grad_rows, p_lse, p_delta, p_dk, p_dv, p_dk_position, p_dbias, t,
    H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = Numbers(
        H, group, Lq, Lk, table_stride, left, right, offset, scale, softcap, seed, q0, k0, threshold, dropout_scale
    )
    # which keys of which key/value head; under a causal mask the first ones have most to do, so they begin
    n_tiles, Hk = tl.cdiv(Lk, BLOCK_N), H // group
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    j0 = tl.program_id(0) % n_tiles * BLOCK_N
    b, h_k = i_bh // Hk, i_bh % Hk
    n_keys = key_count(t, b, Lk)
    key_positions = None if t.k_position is None else head_of(t.k_position, b, h_k)

    # keys and values stay in registers (algorithm 2, lines 6 and 7)
    k = load_rows(head_of(k_rows, b, h_k), j0, n_keys, D, BLOCK_N, BLOCK_D, True)
    v = load_rows(head_of(v_rows, b, h_k), j0, n_keys, D, BLOCK_N, BLOCK_D, True)
    k_position = load_position(key_positions, k, j0, n_keys, D, BLOCK_N, BLOCK_D, True)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_position = tl.zeros([1, 1] if t.k_position is None else [BLOCK_N, BLOCK_D], tl.float32)

    # the queries of every head that shares them: full tiles, then the edges
    begin, full_begin, full_end, end = tiles_of_queries(t, Head(b, h_k, n_keys, None), j0, n, BLOCK_M, BLOCK_N)
    o_j = tl.arange(0, BLOCK_N)
    for h in range(h_k * group, (h_k + 1) * group):
        head, i_row = Head(b, h, n_keys, None), (b * H + h) * Lq
        queries, grads = head_of(q_rows, b, h), head_of(grad_rows, b, h)
        query_positions = None if t.q_position is None else head_of(t.q_position, b, h)
        dbias = tl.zeros([1] if p_dbias is None else [BLOCK_N], tl.float32)
        for tile in tl.range(full_begin, full_end, disable_licm=True):
            dk, dv, dk_position, dbias = dkdv_tile(
                dk, dv, dk_position, dbias, k, v, k_position, queries, query_positions, grads, p_lse + i_row,
                p_delta + i_row, t, head, tile, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
        for step in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
            dk, dv, dk_position, dbias = dkdv_tile(
                dk, dv, dk_position, dbias, k, v, k_position, queries, query_positions, grads, p_lse + i_row,
                p_delta + i_row, t, head, edge_tile(step, begin, full_begin, full_end), j0, n,
                D, BLOCK_M, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
        if p_dbias is not None:
            tl.store(p_dbias + (b * H + h) * Lk + j0 + o_j, tl.where(o_j < n_keys - j0, dbias, 0.0), mask=o_j < Lk - j0)
    # keys that do not exist were never masked: no other row saw them
    m_j = (o_j < n_keys - j0)[:, None]
    o_head = i_bh * Lk * D
    store_rows(tl.where(m_j, dk * scale, 0.0), p_dk + o_head, j0, Lk, D, BLOCK_N, BLOCK_D)
    store_rows(tl.where(m_j, dv * dropout_scale, 0.0), p_dv + o_head, j0, Lk, D, BLOCK_N, BLOCK_D)
    if t.k_position is not None:
        store_rows(tl.where(m_j, dk_position * scale, 0.0), p_dk_position + o_head, j0, Lk, D, BLOCK_N, BLOCK_D)


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, a: tuple, wanted: set[str]
) -> dict[str, Tensor]:
    """Gradients of the op `attention_backward` by name: those of q, k, v and what stands beside them, and what else is
    wanted.
    """
    (B, H, Lq, D), (Hk, Lk) = a.q.shape, a.k.shape[1:3]
    q, k, v = strided(a.q), strided(a.k), strided(a.v)
    grad, out = strided(grad), out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    made = {
        name: getattr(a, name).new_empty(getattr(a, name).shape)
        for name in ("q", "k", "v", "q_position", "k_position", "same")
        if getattr(a, name) is not None
    }
    lse_unit, delta = torch.empty_like(lse), torch.empty_like(lse)
    of_queries, of_keys = sums_of_rows(a, wanted)
    t, n, seen = terms(a), numbers(a), (*signature(a, grad.p, grad_lse, out, lse), "bias" in wanted)
    with torch.cuda.device_of(out):
        chosen = tiles_for("dq", a)
        launch(
            dq_kernel, cdiv(Lq, chosen.BLOCK_M) * H * B, chosen, seen,
            q, k, v, grad, grad_lse, out, lse, lse_unit, delta, made["q"], made.get("q_position"), made.get("same"),
            of_queries, with_bounds(t, chosen), *n, D, chosen.BLOCK_M, chosen.BLOCK_N, block_d(D),
        )  # fmt: skip
        chosen = tiles_for("dkdv", a)
        launch(
            dkdv_kernel, cdiv(Lk, chosen.BLOCK_N) * Hk * B, chosen, seen,
            q, k, v, grad, lse_unit, delta, made["k"], made["v"], made.get("k_position"), of_keys,
            with_bounds(t, chosen), *n, D, chosen.BLOCK_M, chosen.BLOCK_N, block_d(D),
        )  # fmt: skip
        saved = Saved(q, k, v, grad, lse_unit, delta)
        if "bias" in wanted:
            made["bias"] = bias_gradient(saved, of_queries if of_keys is None else of_keys, t, a, seen)
        return made | distance_gradients(saved, t, a, wanted, seen)

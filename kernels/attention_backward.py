"""The gradient of flash attention: walks over the tiles, none of which needs an atomic, so that it repeats bit for bit.

    dq          a program owns queries and walks keys; it leaves δ[i] = ⟨grad[i], out[i]⟩ and lse in its unit to the others
    dk, dv      a program owns keys of a key/value head and walks the queries of every query head that shares it
    the rest    kernels/term_gradients.py

Every walk recomputes P = exp(score - lse) and dS = P ∘ (dP - δ). Rows past the end and rows that see nothing have
lse = +inf here, hence P = 0 without a mask. Shapes and meanings: fastlm/ops/attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import numbers, rows, terms, tiles_for, with_bounds
from fastlm.kernels.term_gradients import Saved, bias_gradient, distance_gradients
from fastlm.kernels.terms import (
    UNSPECIALIZED,
    Head,
    Numbers,
    by_distance,
    distance_rows,
    gradient,
    key_count,
    load_vector,
    places,
    probabilities,
    same_group,
    scores,
    survive,
    tiles_of_keys,
    tiles_of_queries,
    units,
)  # fmt: skip
from fastlm.kernels.tile import LOG2E, cast, dot, edge_tile, load_head, load_rows, store_rows
from fastlm.kernels.tiles import block_d

# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def dq_tile(
    dq, dq_position, dsame, q, q_position, grad, lse, delta, p_k, p_v, stride_k, stride_v, p_k_position, t, head, i0, tile, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dq [M, D] += dS k over one tile of keys, and its share of the other gradients that queries own."""
    j0 = tile * BLOCK_N
    k = load_rows(p_k, j0, head.n_keys, stride_k, D, BLOCK_N, BLOCK_D, EDGE)
    v = load_rows(p_v, j0, head.n_keys, stride_v, D, BLOCK_N, BLOCK_D, EDGE)
    k_position = (
        k
        if p_k_position is None
        else load_rows(p_k_position, j0, head.n_keys, t.k_position_strides[2], D, BLOCK_N, BLOCK_D, EDGE)
    )
    x = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, EDGE, False)
    p = probabilities(x, lse[:, None], q.dtype, n.scale)
    ds = p * (gradient(grad, v, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False) - delta[:, None])
    if t.same is not None:
        o_i, o_j = places(BLOCK_M, BLOCK_N, False)
        dsame += tl.sum(tl.where(same_group(t, head, i0, j0, o_i, o_j, n), ds, 0.0), 1)
    ds = cast(ds, k.dtype)
    dq = dot(ds, k, dq)
    if t.query_vectors is not None:
        ds, vectors = (
            by_distance(ds, BLOCK_M, False, False),
            distance_rows(t.query_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D),
        )
        if t.q_position is None:
            dq = dot(ds, vectors, dq)
        else:
            dq_position = dot(ds, vectors, dq_position)
    return dq, dq_position, dsame


@triton.jit
def dkdv_tile(
    dk, dv, dk_position, k, v, k_position, p_q, stride_q, p_q_position, p_grad, p_lse, p_delta, t, head, tile, j0, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dv [N, D] += P̂ᵀ grad and dk [N, D] += dSᵀ q over one tile of queries; everything is held keys × queries."""
    i0 = tile * BLOCK_M
    q = load_rows(p_q, i0, n.Lq, stride_q, D, BLOCK_M, BLOCK_D, EDGE)
    q_position = (
        q
        if p_q_position is None
        else load_rows(p_q_position, i0, n.Lq, t.q_position_strides[2], D, BLOCK_M, BLOCK_D, EDGE)
    )
    grad = load_rows(p_grad, i0, n.Lq, D, D, BLOCK_M, BLOCK_D, EDGE)
    x = scores(q, k, q_position, k_position, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, EDGE, True)
    p = probabilities(x, load_vector(p_lse, i0, n.Lq, BLOCK_M, float("inf"), EDGE)[None, :], q.dtype, n.scale)
    dv = dot(cast(survive(p, head, i0, j0, n, BLOCK_M, BLOCK_N, True), grad.dtype), grad, dv)
    dp = gradient(grad, v, t, head, i0, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, True)
    ds = cast(p * (dp - load_vector(p_delta, i0, n.Lq, BLOCK_M, 0.0, EDGE)[None, :]), q.dtype)
    dk = dot(ds, q, dk)
    if t.key_vectors is not None:
        ds, vectors = (
            by_distance(ds, BLOCK_N, True, True),
            distance_rows(t.key_vectors, head, i0, j0, n, D, BLOCK_N, BLOCK_D),
        )
        if t.k_position is None:
            dk = dot(ds, vectors, dk)
        else:
            dk_position = dot(ds, vectors, dk_position)
    return dk, dv, dk_position


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq_kernel(
    p_q, p_k, p_v, p_grad, p_grad_lse, p_out, p_lse, p_lse_unit, p_delta, p_dq, p_dq_position, p_dsame, q_strides, k_strides, v_strides, t,
    H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = Numbers(H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale)
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    b, h = i_bh // H, i_bh % H
    head = Head(b, h, key_count(t, b, Lk))
    p_k += b * k_strides[0] + h // group * k_strides[1]
    p_v += b * v_strides[0] + h // group * v_strides[1]
    p_k_position = (
        None
        if t.k_position is None
        else t.k_position + (b * t.k_position_strides[0] + h // group * t.k_position_strides[1])
    )

    q = load_head(p_q, q_strides, b, h, i0, Lq, D, BLOCK_M, BLOCK_D)
    q_position = (
        q if t.q_position is None else load_head(t.q_position, t.q_position_strides, b, h, i0, Lq, D, BLOCK_M, BLOCK_D)
    )
    grad = load_rows(p_grad + i_bh * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D, True)
    out = load_rows(p_out + i_bh * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if p_grad_lse is not None:
        delta -= load_vector(p_grad_lse + i_bh * Lq, i0, Lq, BLOCK_M, 0.0, True)
    lse = load_vector(p_lse + i_bh * Lq, i0, Lq, BLOCK_M, float("inf"), True)
    _, to_log2 = units(q.dtype, scale)
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * (LOG2E / to_log2)
    o_i = tl.arange(0, BLOCK_M)
    tl.store(p_delta + i_bh * Lq + i0 + o_i, delta, mask=o_i < Lq - i0)
    tl.store(p_lse_unit + i_bh * Lq + i0 + o_i, lse, mask=o_i < Lq - i0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq_position = tl.zeros([1, 1] if t.q_position is None else [BLOCK_M, BLOCK_D], tl.float32)
    dsame = tl.zeros([1] if t.same is None else [BLOCK_M], tl.float32)
    begin, full_begin, full_end, end = tiles_of_keys(t, head, i0, n, BLOCK_M, BLOCK_N)
    for tile in tl.range(full_begin, full_end, disable_licm=True):
        dq, dq_position, dsame = dq_tile(
            dq, dq_position, dsame, q, q_position, grad, lse, delta, p_k, p_v, k_strides[2], v_strides[2], p_k_position, t, head, i0, tile, n,
            D, BLOCK_M, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for step in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
        dq, dq_position, dsame = dq_tile(
            dq, dq_position, dsame, q, q_position, grad, lse, delta, p_k, p_v, k_strides[2], v_strides[2], p_k_position, t, head, i0,
            edge_tile(step, begin, full_begin, full_end), n, D, BLOCK_M, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    store_rows(dq * scale, p_dq + i_bh * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D)
    if t.q_position is not None:
        store_rows(dq_position * scale, p_dq_position + i_bh * Lq * D, i0, Lq, D, D, BLOCK_M, BLOCK_D)
    if t.same is not None:
        tl.store(p_dsame + i_bh * Lq + i0 + o_i, dsame, mask=o_i < Lq - i0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv_kernel(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_dk, p_dv, p_dk_position, q_strides, k_strides, v_strides, t,
    H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = Numbers(H, group, Lq, Lk, left, right, offset, scale, seed, threshold, kept_scale)
    n_tiles, Hk = tl.cdiv(Lk, BLOCK_N), H // group
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    j0 = tl.program_id(0) % n_tiles * BLOCK_N  # under a causal mask the first keys have most to do
    b, h_k = i_bh // Hk, i_bh % Hk
    n_keys = key_count(t, b, Lk)

    k = load_head(p_k, k_strides, b, h_k, j0, n_keys, D, BLOCK_N, BLOCK_D)
    v = load_head(p_v, v_strides, b, h_k, j0, n_keys, D, BLOCK_N, BLOCK_D)
    k_position = (
        k
        if t.k_position is None
        else load_head(t.k_position, t.k_position_strides, b, h_k, j0, n_keys, D, BLOCK_N, BLOCK_D)
    )
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_position = tl.zeros([1, 1] if t.k_position is None else [BLOCK_N, BLOCK_D], tl.float32)

    begin, full_begin, full_end, end = tiles_of_queries(t, Head(b, h_k, n_keys), j0, n, BLOCK_M, BLOCK_N)
    for h in range(h_k * group, (h_k + 1) * group):
        head, i_row = Head(b, h, n_keys), (b * H + h) * Lq
        p_qh = p_q + (b * q_strides[0] + h * q_strides[1])
        p_q_position = (
            None if t.q_position is None else t.q_position + (b * t.q_position_strides[0] + h * t.q_position_strides[1])
        )
        for tile in tl.range(full_begin, full_end, disable_licm=True):
            dk, dv, dk_position = dkdv_tile(
                dk, dv, dk_position, k, v, k_position, p_qh, q_strides[2], p_q_position, p_grad + i_row * D, p_lse + i_row, p_delta + i_row,
                t, head, tile, j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
        for step in tl.range(end - begin - (full_end - full_begin), disable_licm=True):
            dk, dv, dk_position = dkdv_tile(
                dk, dv, dk_position, k, v, k_position, p_qh, q_strides[2], p_q_position, p_grad + i_row * D, p_lse + i_row, p_delta + i_row,
                t, head, edge_tile(step, begin, full_begin, full_end), j0, n, D, BLOCK_M, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
    # keys that do not exist were never masked: no other row saw them
    m_j = (tl.arange(0, BLOCK_N) < n_keys - j0)[:, None]
    store_rows(tl.where(m_j, dk * scale, 0.0), p_dk + i_bh * Lk * D, j0, Lk, D, D, BLOCK_N, BLOCK_D)
    store_rows(tl.where(m_j, dv * kept_scale, 0.0), p_dv + i_bh * Lk * D, j0, Lk, D, D, BLOCK_N, BLOCK_D)
    if t.k_position is not None:
        store_rows(
            tl.where(m_j, dk_position * scale, 0.0), p_dk_position + i_bh * Lk * D, j0, Lk, D, D, BLOCK_N, BLOCK_D
        )


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, a: tuple, wanted: set[str]
) -> dict[str, Tensor]:
    """Gradients of the op `attention_backward` by name: those of q, k, v and what stands beside them, and what else is
    wanted."""
    (B, H, Lq, D), (Hk, Lk) = a.q.shape, a.k.shape[1:3]
    q, k, v, grad, out = rows(a.q), rows(a.k), rows(a.v), grad.contiguous(), out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    made = {
        name: getattr(a, name).new_empty(getattr(a, name).shape)
        for name in ("q", "k", "v", "q_position", "k_position", "same")
        if getattr(a, name) is not None
    }
    lse_unit, delta = torch.empty_like(lse), torch.empty_like(lse)
    strides, t, n = (q.stride()[:3], k.stride()[:3], v.stride()[:3]), terms(a), numbers(a)
    with torch.cuda.device_of(q):
        chosen = tiles_for("dq", a)
        dq_kernel[(triton.cdiv(Lq, chosen.BLOCK_M) * H * B,)](
            q, k, v, grad, grad_lse, out, lse, lse_unit, delta, made["q"], made.get("q_position"), made.get("same"), *strides, with_bounds(t, chosen), *n,
            D, BLOCK_D=block_d(D), **chosen._asdict(),
        )  # fmt: skip
        chosen = tiles_for("dkdv", a)
        dkdv_kernel[(triton.cdiv(Lk, chosen.BLOCK_N) * Hk * B,)](
            q, k, v, grad, lse_unit, delta, made["k"], made["v"], made.get("k_position"), *strides, with_bounds(t, chosen), *n,
            D, BLOCK_D=block_d(D), **chosen._asdict(),
        )  # fmt: skip
        saved = Saved(q, k, v, grad, lse_unit, delta)
        if "bias" in wanted:
            made["bias"] = bias_gradient(saved, t, a)
        return made | distance_gradients(saved, t, a, wanted)

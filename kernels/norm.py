"""Layer norm and RMS norm of rows with a residual, and their gradient, in one pass each. Formulas: fastlm/ops/norm.py.

A tile is BLOCK_M whole rows, which stay in registers. A program of the gradient takes a run of rows, whose number
depends on how many rows there are and on nothing else, and leaves what they add to the weight's and the bias's
gradients; these partial sums are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import launch, looks
from fastlm.kernels.tile import cast
from fastlm.kernels.tiles import Tiles, cdiv, power_of_two

PROGRAMS = 512  # of a gradient, at most; four for each multiprocessor of the largest GPUs

# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=["n_rows"])
def norm_kernel(
    p_x, p_residual, p_weight, p_bias, p_y, p_s, p_statistics, n_rows, eps, weight_offset,
    D: tl.constexpr, CENTRED: tl.constexpr, ROUNDS_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y, s = x + residual and statistics of a tile. p_residual and p_s, p_weight and p_bias may be None."""
    o_row, o_d = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_row, m_d = o_row < n_rows, o_d < D
    o, m = o_row[:, None] * D + o_d[None, :], m_row[:, None] & m_d[None, :]
    s = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    if p_residual is not None:
        stored = cast(s + tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32), p_s.dtype.element_ty)
        tl.store(p_s + o, stored, mask=m)
        s = stored.to(tl.float32)
    if CENTRED:
        mean = tl.sum(s, 1) / D
        tl.store(p_statistics + o_row, mean, mask=m_row)
        p_statistics += n_rows
        s = tl.where(m, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps)
    tl.store(p_statistics + o_row, rstd, mask=m_row)
    y = s * rstd[:, None]
    if ROUNDS_FIRST:
        y = cast(y, p_y.dtype.element_ty).to(tl.float32)
    if p_weight is not None:
        y *= (tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32) + weight_offset)[None, :]
    if p_bias is not None:
        y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o, cast(y, p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n_rows", "run"])
def norm_backward_kernel(
    p_dy, p_ds, p_s, p_statistics, p_weight, p_dx, p_sums, n_rows, run, weight_offset,
    D: tl.constexpr, CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of `run` rows, and Σ dy · n and Σ dy over them, into p_sums [2, programs, D]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    o_d = tl.arange(0, BLOCK_N)
    m_d = o_d < D
    first = program.to(tl.int64) * run
    p_rstd = p_statistics
    if CENTRED:
        p_rstd += n_rows
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, run, BLOCK_M):
        o_row = first + done + tl.arange(0, BLOCK_M)
        m_row = (o_row < first + run) & (o_row < n_rows)
        o, m = o_row[:, None] * D + o_d[None, :], m_row[:, None] & m_d[None, :]
        dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        n = tl.load(p_s + o, mask=m, other=0.0).to(tl.float32)
        if CENTRED:
            n = tl.where(m, n - tl.load(p_statistics + o_row, mask=m_row, other=0.0)[:, None], 0.0)
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)[:, None]
        n *= rstd
        dweight += dy * n
        dbias += dy
        g = dy
        if p_weight is not None:
            g *= (tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32) + weight_offset)[None, :]
        dx = g - n * (tl.sum(g * n, 1) / D)[:, None]
        if CENTRED:
            dx -= (tl.sum(g, 1) / D)[:, None]
        dx *= rstd
        if p_ds is not None:
            dx += tl.load(p_ds + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + o, cast(dx, p_dx.dtype.element_ty), mask=m)
    p_sums += program.to(tl.int64) * D + o_d
    tl.store(p_sums, tl.sum(dweight, 0), mask=m_d)
    tl.store(p_sums + programs.to(tl.int64) * D, tl.sum(dbias, 0), mask=m_d)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def forward(a: tuple, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel of layer norm, or without centred of RMS norm. Arguments and results: the ops'."""
    seen = looks(*a, centred)
    x, residual, weight, bias = (None if t is None else t.contiguous() for t in a[:4])
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y, s = x.new_empty(x.shape, dtype=dtype), None if residual is None else x.new_empty(x.shape, dtype=dtype)
    n_rows, D = x.shape[:-1].numel(), x.shape[-1]
    statistics = x.new_empty(1 + centred, n_rows, dtype=torch.float32)
    rows, tiles = _tiles(D)
    if n_rows:
        with torch.cuda.device_of(x):
            launch(
                norm_kernel, cdiv(n_rows, rows), tiles, seen,
                x, residual, weight, bias, y, s, statistics,
                n_rows, a.eps, a.weight_offset, D, centred, a.rounds_first and dtype != torch.float32, *tiles[:2],
            )  # fmt: skip
    return y, x.new_empty(0) if s is None else s, statistics


def backward(a: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the gradient's kernel. Arguments and results: the ops'."""
    seen = looks(*a)
    dy, ds, s, weight = (None if t is None else t.contiguous() for t in (a.dy, a.ds, a.s, a.weight))
    dx, D, n_rows = torch.empty_like(s), s.shape[-1], a.statistics.shape[1]
    rows, tiles = _tiles(D)
    run = rows * max(1, cdiv(n_rows, rows * PROGRAMS))
    programs = cdiv(n_rows, run)
    sums = s.new_empty(2, programs, D, dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(s):
            launch(
                norm_backward_kernel, programs, tiles, seen,
                dy, ds, s, a.statistics, weight, dx, sums, n_rows, run, a.weight_offset,
                D, len(a.statistics) == 2, *tiles[:2],
            )  # fmt: skip
    wanted = weight is not None, a.of_bias
    dweight, dbias = (x.sum(0) if give else x.new_empty(0) for x, give in zip(sums, wanted, strict=True))
    return dx, dweight, dbias


def _tiles(D: int) -> tuple[int, Tiles]:
    """(rows of a tile, the tile): 2048 elements for four warps, or one long row for more."""
    columns = power_of_two(D)
    rows = max(1, 2048 // columns)
    return rows, Tiles(rows, columns, num_warps=min(32, max(4, columns // 256)), num_stages=1)

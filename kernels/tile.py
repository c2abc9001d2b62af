"""What the kernels share: matrices in memory, a tile of rows, a matrix product, tanh, a read through the cache.

A tile is [BLOCK, BLOCK_D], BLOCK_D the power of two that holds D channels; what lies outside the matrix is read as zero
and never written. The offset of a tile's first row is 64-bit, offsets inside a tile are 32-bit: `launch.rows` sees to
it that they fit.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """[B, heads, L, D] in memory, channels side by side: a pointer, and strides of row of the batch, head and
    position.
    """

    p: Any
    strides: Any


class Matrix(NamedTuple):
    """[L, D], one head of them: a pointer, and the stride of rows."""

    p: Any
    stride: Any


# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x fp32 → dtype, to the nearest. Triton's interpreter would cut bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def places(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """(o_i, o_j) of a tile."""
    if KEYS_FIRST:
        return tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
    else:
        return tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def head_of(x, b, h):
    """The Matrix of one head of x, Rows."""
    return Matrix(x.p + (b * x.strides[0] + h * x.strides[1]), x.strides[2])


@triton.jit
def load_rows(m, row, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """Rows row … row + BLOCK - 1 of the Matrix m [n_rows, D]. EDGE: some of them may lie past its end."""
    o_row, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    p_tile = m.p + tl.cast(row, tl.int64) * m.stride + (o_row[:, None] * m.stride + o_d[None, :])
    if EDGE:
        return tl.load(p_tile, mask=(o_row < n_rows - row)[:, None] & (o_d < D)[None, :], other=0.0)
    if D < BLOCK_D:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def load_position(
    m, rows, row, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr
):
    """What meets rows by distance: rows of m, or if there is no m the queries' or keys' own `rows`, already here."""
    return rows if m is None else load_rows(m, row, n_rows, D, BLOCK, BLOCK_D, EDGE)


@triton.jit
def store_rows(x, p, row, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows into [n_rows, D] at p, without gaps, rounding x [BLOCK, BLOCK_D] to p's dtype."""
    o_row, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    p_tile = p + tl.cast(row, tl.int64) * D + (o_row[:, None] * D + o_d[None, :])
    tl.store(p_tile, cast(x, p.dtype.element_ty), mask=(o_row < n_rows - row)[:, None] & (o_d < D)[None, :])


@triton.jit
def dot(a, b, acc=None):
    """acc + a [M, K] @ b [K, N] in fp32: tensor cores for 16-bit inputs, true fp32 (never TF32) for fp32.

    Triton's interpreter multiplies the bit patterns of bf16, and rounds fp32 as NumPy happens to: there, in fp64.
    """
    if INTERPRETED:
        exact = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64), out_dtype=tl.float64).to(
            tl.float32
        )
        return exact if acc is None else acc + exact
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def accumulate(total, x):
    """total + x, where total is None before the first x."""
    return x if total is None else total + x


@triton.jit
def fma(x, y, z):
    """x · y + z, rounded once. The interpreter would round twice, and newer compilers fuse only when told."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def tanh(x):
    """By e^(-2|x|) where no digits cancel, else by the polynomial of csrc/cpu/vector.h."""
    square, power = x * x, tl.exp(-2.0 * tl.abs(x))
    p = -5.704978373e-03 * square + 2.063907874e-02
    p = (p * square - 5.373971216e-02) * square + 1.333144216e-01
    near = x + x * square * (p * square - 3.333328194e-01)
    far = 1.0 - 2.0 * power / (1.0 + power)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def load_readonly(p):
    """Values of 16, 32 or 64 bits at the pointers p [M, N], through the read-only cache.

    A tl.load here is pipelined: one [M, N] buffer of shared memory for each stage, more than the tile has. Through
    assembly the compiler does not see a load, but does see that pointers which are equal for elements of one thread
    need one.
    """
    dtype: tl.constexpr = p.dtype.element_ty
    if INTERPRETED:
        return tl.load(p)
    elif dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("ld.global.nc.b16 $0, [$1];", "=h,l", [p], dtype=tl.int16, is_pure=True, pack=1)
        return x.to(dtype, bitcast=True)
    elif dtype.primitive_bitwidth == 32:
        x = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [p], dtype=tl.int32, is_pure=True, pack=1)
        return x.to(dtype, bitcast=True)
    else:
        x = tl.inline_asm_elementwise("ld.global.nc.b64 $0, [$1];", "=l,l", [p], dtype=tl.int64, is_pure=True, pack=1)
        return x.to(dtype, bitcast=True)


@triton.jit
def load_vector(p, i0, Lq, BLOCK: tl.constexpr, other: tl.constexpr, EDGE: tl.constexpr):
    """Elements i0 … i0 + BLOCK - 1 of the fp32 vector [Lq] at p. EDGE: some may lie past its end, and are `other`."""
    o_i = tl.arange(0, BLOCK)
    if EDGE:
        return tl.where(o_i < Lq - i0, load_readonly(p + i0 + tl.minimum(o_i, Lq - 1 - i0)), other)
    return load_readonly(p + i0 + o_i)

"""Rotary embedding in one pass: read x, turn its pairs of channels in fp32, write. Formula and layouts:
fastlm/ops/rotary.py.

A program owns BLOCK_L positions of one row of the batch: it reads their cos and sin once and walks the heads. x may
have any strides with adjacent channels, so a [B, L, H, D] tensor seen as [B, H, L, D] is read in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import launch, looks, strided
from fastlm.kernels.tile import cast, fma
from fastlm.kernels.tiles import Tiles, cdiv, power_of_two

# ---------------------------------------------------------------------------------------------------------------------
# Kernel


@triton.jit(do_not_specialize=["H", "L"])
def rotate_kernel(
    rows, p_cos, p_sin, p_y, angle_stride, H, L,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_R ≥ R/2 pairs turn, BLOCK_REST ≥ D - R channels are copied. angle_stride: from one batch row's angles to
    the next's.
    """
    n_tiles = tl.cdiv(L, BLOCK_L)
    b, l0 = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles * BLOCK_L
    o_l, o_r = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    m_l = (o_l < L - l0)[:, None]
    m_r = m_l & (o_r < R // 2)[None, :]
    o_angle = b * angle_stride + (l0.to(tl.int64) + o_l[:, None]) * (R // 2) + o_r[None, :]
    cos = tl.load(p_cos + o_angle, mask=m_r, other=1.0).to(tl.float32)
    sin = tl.load(p_sin + o_angle, mask=m_r, other=0.0).to(tl.float32)

    # the same angles turn every head
    p_x = rows.p + (b * rows.strides[0] + l0.to(tl.int64) * rows.strides[2])
    p_y += (b * H * L + l0) * D
    for _ in range(H):
        if INTERLEAVED:
            o_c = tl.arange(0, 2 * BLOCK_R)[None, :]
            m_c = m_l & (o_c < R)
            pairs = tl.load(p_x + o_l[:, None] * rows.strides[2] + o_c, mask=m_c, other=0.0).to(tl.float32)
            x1, x2 = pairs.reshape(BLOCK_L, BLOCK_R, 2).split()
            turned = tl.join(fma(x1, cos, -x2 * sin), fma(x2, cos, x1 * sin)).reshape(BLOCK_L, 2 * BLOCK_R)
            tl.store(p_y + o_l[:, None] * D + o_c, cast(turned, p_y.dtype.element_ty), mask=m_c)
        else:
            x1 = tl.load(p_x + o_l[:, None] * rows.strides[2] + o_r[None, :], mask=m_r, other=0.0).to(tl.float32)
            x2 = tl.load(p_x + o_l[:, None] * rows.strides[2] + o_r[None, :] + R // 2, mask=m_r, other=0.0).to(
                tl.float32
            )
            p_turned = p_y + o_l[:, None] * D + o_r[None, :]
            tl.store(p_turned, cast(fma(x1, cos, -x2 * sin), p_y.dtype.element_ty), mask=m_r)
            tl.store(p_turned + R // 2, cast(fma(x2, cos, x1 * sin), p_y.dtype.element_ty), mask=m_r)
        if R < D:
            o_c = R + tl.arange(0, BLOCK_REST)[None, :]
            rest = tl.load(p_x + o_l[:, None] * rows.strides[2] + o_c, mask=m_l & (o_c < D))
            tl.store(p_y + o_l[:, None] * D + o_c, rest, mask=m_l & (o_c < D))
        p_x += rows.strides[1]
        p_y += L * D


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Launch the kernel. Arguments and result: the op `rotate`."""
    B, H, L, D = x.shape
    R = 2 * cos.shape[-1]
    seen = looks(x, cos, sin, layout)
    rows, cos, sin = strided(x), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_r = power_of_two(max(R // 2, 1))
    block_l = max(1, 512 // block_r)  # a few hundred pairs keep 4 warps busy with 16-byte loads
    with torch.cuda.device_of(x):
        launch(
            rotate_kernel, cdiv(L, block_l) * B, Tiles(block_l, block_r, num_warps=4, num_stages=3), seen,
            rows, cos, sin, y, cos.stride(0) if cos.ndim == 3 else 0, H, L, D, R, layout == "interleaved",
            block_l, block_r, power_of_two(max(D - R, 1)),
        )  # fmt: skip
    return y

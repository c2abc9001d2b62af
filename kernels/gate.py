"""Gated activations y = f(gate) · up of rows [gate, up], and their gradient, in one pass each. Formulas:
fastlm/ops/gate.py.

A program takes BLOCK elements of y, counted through all rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import launch, looks
from fastlm.kernels.tile import cast, tanh
from fastlm.kernels.tiles import Tiles, cdiv

BLOCK = 1024

# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def curve(x, ACTIVATION: tl.constexpr):
    """(f(x), f'(x)) in fp32."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        y = tanh(x)
        return y, 1.0 - y * y
    elif ACTIVATION == "gelu":
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * phi, phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        inner = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
        share = tl.sigmoid(inner)
        slope = share * tl.sigmoid(-inner) * (1.5957691216057308 * (1.0 + 0.134145 * square))
        return x * share, share + x * slope
    else:
        share = tl.sigmoid(x)
        return x * share, share + x * share * tl.sigmoid(-x)


@triton.jit
def gated_kernel(p_x, p_y, n, H: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """n: elements of y."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m, p_gate = o < n, p_x + o + o // H * H
    gate, up = tl.load(p_gate, mask=m).to(tl.float32), tl.load(p_gate + H, mask=m).to(tl.float32)
    f, _ = curve(gate, ACTIVATION)
    tl.store(p_y + o, cast(f * up, p_y.dtype.element_ty), mask=m)


@triton.jit
def gated_backward_kernel(p_dy, p_x, p_dx, n, H: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """n: elements of dy."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m, o_gate = o < n, o + o // H * H
    dy = tl.load(p_dy + o, mask=m).to(tl.float32)
    gate, up = tl.load(p_x + o_gate, mask=m).to(tl.float32), tl.load(p_x + o_gate + H, mask=m).to(tl.float32)
    f, slope = curve(gate, ACTIVATION)
    tl.store(p_dx + o_gate, cast(dy * up * slope, p_dx.dtype.element_ty), mask=m)
    tl.store(p_dx + o_gate + H, cast(dy * f, p_dx.dtype.element_ty), mask=m)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def gated(x: Tensor, activation: str) -> Tensor:
    """Launch the kernel. Arguments and result: the op `gated`."""
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _launch(gated_kernel, x, y, y=y, activation=activation)
    return y


def gated_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """Launch the gradient's kernel. Arguments and result: the op `gated_backward`."""
    dy, x, dx = dy.contiguous(), x.contiguous(), x.new_empty(x.shape)
    _launch(gated_backward_kernel, dy, x, dx, y=dy, activation=activation)
    return dx


def _launch(kernel, *tensors: Tensor, y: Tensor, activation: str) -> None:
    n, H = y.numel(), y.shape[-1]
    if n == 0:
        return
    with torch.cuda.device_of(y):
        tiles = Tiles(BLOCK, 1, num_warps=4, num_stages=1)
        launch(kernel, cdiv(n, BLOCK), tiles, looks(*tensors, activation), *tensors, n, H, activation, BLOCK)

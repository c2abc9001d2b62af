"""Rotary position embedding: turn pairs of channels by an angle that grows with position.

    (x₁, x₂) → (x₁ cos θ - x₂ sin θ, x₂ cos θ + x₁ sin θ)                           Su et al. 2021, eq. 34

Layouts: "half" pairs channel i with i + R/2 (GPT-NeoX, Llama); "interleaved" pairs 2i with 2i + 1 (the paper, GPT-J).
R = 2 · cos.shape[-1] channels turn; the D - R after them pass through (partial rotary).
Shapes: x [B, H, L, D] any float dtype; cos, sin [L, R/2] or [B, L, R/2] fp32.
"""

import torch
from torch import Tensor

from fastlm import native
from fastlm.dispatch import op

LAYOUTS = ("half", "interleaved")

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op
def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Return x with its first R channels turned, in x's dtype; the arithmetic is fp32 (fp64 for fp64 x)."""
    R = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    turning, rest = x[..., :R].to(wide), x[..., R:]
    c, s = (a.to(wide) if a.ndim == 2 else a.to(wide)[:, None] for a in (cos, sin))
    pairs = turning.unflatten(-1, (2, R // 2) if layout == "half" else (R // 2, 2))
    axis = -2 if layout == "half" else -1
    x1, x2 = pairs.unbind(axis)
    turned = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), axis).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _triton_refuses(x, cos, sin, layout):
    return None if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else f"x is {x.dtype}; served are fp32, bf16 and fp16"


@rotate.backend("triton", devices=("cuda",), missing=native.triton_missing, refuses=_triton_refuses)
def _(x, cos, sin, layout):
    from fastlm.kernels.rotary import rotate as launch

    return launch(x, cos, sin, layout)


def _cpp_refuses(x, cos, sin, layout):
    return None if x.dtype in native.DTYPES else f"x is {x.dtype}; served are fp32, bf16 and fp16"


@rotate.backend("cpp", devices=("cpu",), missing=native.cpp_missing, refuses=_cpp_refuses)
def _(x, cos, sin, layout):
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    per_row = cos[0].numel() if cos.ndim == 3 else 0
    native.cpu().rotate(
        x.data_ptr(), out.data_ptr(), native.DTYPES[x.dtype], x.shape, x.stride(), out.stride(),
        cos.data_ptr(), sin.data_ptr(), per_row, 2 * cos.shape[-1], layout == "interleaved", torch.get_num_threads(),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Gradient: a rotation's transpose is the rotation by the negative angle


def _save(ctx, inputs, output):
    _, cos, sin, ctx.layout = inputs
    ctx.save_for_backward(cos, sin)


@rotate.gradient(save=_save)
def _(ctx, grad):
    cos, sin = ctx.saved_tensors
    return rotate(grad.contiguous(), cos, -sin, ctx.layout), None, None, None

"""Rotary position embedding: turn pairs of channels by an angle that grows with position.

    (x₁, x₂) → (x₁ cos θ - x₂ sin θ, x₂ cos θ + x₁ sin θ)                           Su et al. 2021, eq. 34

Layouts: "half" pairs channel i with i + R/2 (GPT-NeoX, Llama); "interleaved" pairs 2i with 2i + 1 (the paper, GPT-J).
R = 2 · cos.shape[-1] channels turn; the D - R after them pass through (partial rotary).
Shapes: x [B, H, L, D] any float dtype; cos, sin [L, R/2] or [B, L, R/2] fp32.
"""

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import op

LAYOUTS = ("half", "interleaved")

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op
def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Return x with its first R channels turned, in x's dtype; the arithmetic is fp32 (fp64 for fp64 x)."""
    x1, x2 = _pairs(x, cos.shape[-1], layout)
    c, s = (a.to(x1.dtype) if a.ndim == 2 else a.to(x1.dtype)[:, None] for a in (cos, sin))
    turned = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), -2 if layout == "half" else -1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 2 * cos.shape[-1] :]), -1)


def _pairs(x: Tensor, pairs: int, layout: str) -> tuple[Tensor, Tensor]:
    """The first and the second channel of each pair, [B, H, L, pairs] in fp32 (fp64)."""
    turning = x[..., : 2 * pairs].to(torch.promote_types(x.dtype, torch.float32))
    return (
        turning.unflatten(-1, (2, pairs)).unbind(-2)
        if layout == "half"
        else turning.unflatten(-1, (pairs, 2)).unbind(-1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _triton_refuses(x, cos, sin, layout):
    return (
        None
        if x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        else f"x is {x.dtype}; served are fp32, bf16 and fp16"
    )


@rotate.backend("triton", devices=("cuda",), unavailable=native.triton_missing, refuses=_triton_refuses)
def _(x, cos, sin, layout):
    from fastlm.kernels.rotary import rotate as launch

    return launch(x, cos, sin, layout)


def _cpp_refuses(x, cos, sin, layout):
    return None if x.dtype in native.DTYPES else f"x is {x.dtype}; served are fp32, bf16 and fp16"


@rotate.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_cpp_refuses)
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
    x, cos, sin, ctx.layout = inputs
    ctx.save_for_backward(x if cos.requires_grad or sin.requires_grad else None, cos, sin)


@rotate.gradient(save=_save)
def _(ctx, grad):
    x, cos, sin = ctx.saved_tensors
    dx = rotate(grad.contiguous(), cos, -sin, ctx.layout)
    if x is None:
        return dx, None, None, None
    # for schemes that learn their angles
    (g1, g2), (x1, x2) = (_pairs(t, cos.shape[-1], ctx.layout) for t in (grad, x))
    turned_alike = (0, 1) if cos.ndim == 2 else 1  # rows of the batch and heads, or heads alone
    dcos, dsin = ((g1 * x1 + g2 * x2).sum(turned_alike), (g2 * x1 - g1 * x2).sum(turned_alike))
    return dx, dcos.to(cos.dtype), dsin.to(cos.dtype), None

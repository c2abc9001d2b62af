"""Activations, and gated ones: y = f(gate) · up of rows x = [gate, up], without keeping what they made.

    gelu        f(x) = x Φ(x)                                                     Hendrycks and Gimpel 2016
    gelu_tanh   f(x) = x σ(2u), u = √(2/π) (x + 0.044715 x³)                      the same, its approximation
    relu        f(x) = max(x, 0)
    silu        f(x) = x σ(x)                                                     Elfwing et al. 2018
    tanh        f(x) = tanh x

Gated: GLU's kin (Shazeer 2020), with silu SwiGLU, with either gelu GEGLU, with relu ReGLU. The gradient is made from x
alone: neither f(gate) nor f(gate) · up is kept for it. The arithmetic is fp32 (fp64 for fp64 x).

    x [..., 2 H], or [..., H] without a gate          y [..., H], in x's dtype
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import BackendError, Op, op

ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3, "tanh": 4}  # csrc/cpu/kernels.h: Activation

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op
def gated(x: Tensor, activation: str) -> Tensor:
    """f(gate) · up; activation: f, by its name in ACTIVATIONS."""
    gate, up = _wide(x).chunk(2, -1)
    return (curve(gate, activation)[0] * up).to(x.dtype)


@op
def activated(x: Tensor, activation: str) -> Tensor:
    """f(x); activation: f, by its name in ACTIVATIONS."""
    return curve(_wide(x), activation)[0].to(x.dtype)


@op(gradient_of=gated)
def gated_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x: [dy · up · f'(gate), dy · f(gate)]."""
    gate, up = _wide(x).chunk(2, -1)
    f, slope = curve(gate, activation)
    return torch.cat((_wide(dy) * up * slope, _wide(dy) * f), -1).to(x.dtype)


@op(gradient_of=activated)
def activated_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x: dy · f'(x)."""
    return (_wide(dy) * curve(_wide(x), activation)[1]).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def curve(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(f(x), f'(x))"""
    if activation == "relu":
        return x.relu(), (x > 0).to(x.dtype)
    if activation == "tanh":
        y = x.tanh()
        return y, 1 - y.square()
    if activation == "gelu":
        phi = torch.special.ndtr(x)
        return x * phi, phi + x * (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    inner, outer = x, 1.0  # 2u and its derivative; of silu x
    if activation == "gelu_tanh":
        double = 2 * math.sqrt(2 / math.pi)
        inner, outer = double * (x + 0.044715 * x**3), double * (1 + 3 * 0.044715 * x.square())
    share = inner.sigmoid()
    return x * share, share + x * share * (-inner).sigmoid() * outer


# ---------------------------------------------------------------------------------------------------------------------
# Backends: PyTorch's own where a call takes the host longer than the activation, and in fp64

PYTORCHS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def _torch_is_slower(gates: bool, x: Tensor, activation: str) -> bool:
    """But for calls so small that the host's time counts, and for activations without a gate other than gelu_tanh,
    which PyTorch serves as well: by benchmarks/FACTS.md.
    """
    if x.dtype == torch.float64 or not (gates or activation == "gelu_tanh"):
        return False
    return (x.device.type == "cuda" and gates) or (
        x.device.type == "cpu" and x.numel() >= (2**17 if gates else 2**15) and native.cpp_is_built()
    )


def _torch(gates: bool, x: Tensor, activation: str) -> Tensor:
    if not gates:
        return PYTORCHS[activation](x)
    gate, up = x.chunk(2, -1)
    return PYTORCHS[activation](gate) * up


def _refuses(*args) -> str | None:
    wrong = [x.dtype for x in args if isinstance(x, Tensor) and x.dtype not in native.DTYPES]
    return f"x is {wrong[0]}; served are fp32, bf16 and fp16" if wrong else None


def _triton(x: Tensor, activation: str) -> Tensor:
    from fastlm.kernels.gate import gated as launch

    return launch(x, activation)


def _triton_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    from fastlm.kernels.gate import gated_backward as launch

    return launch(dy, x, activation)


def _cpp(gates: bool, x: Tensor, activation: str) -> Tensor:
    x, H = x.contiguous(), x.shape[-1] // (1 + gates)
    y = x.new_empty(*x.shape[:-1], H)
    tensors, rows, threads = native.named(x=x, y=y), x.shape[:-1].numel(), torch.get_num_threads()
    native.cpu().gate(tensors, rows, H, ACTIVATIONS[activation], gates, threads)
    return y


def _cpp_backward(gates: bool, dy: Tensor, x: Tensor, activation: str) -> Tensor:
    dy, x, dx = dy.contiguous(), x.contiguous(), x.new_empty(x.shape)
    tensors, rows, threads = native.named(x=x, dy=dy, dx=dx), dy.shape[:-1].numel(), torch.get_num_threads()
    native.cpu().gate_backward(tensors, rows, dy.shape[-1], ACTIVATIONS[activation], gates, threads)
    return dx


on_gpu = dict(devices=("cuda",), unavailable=native.triton_missing, refuses=_refuses)
on_cpu = dict(devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)
for _op, _backward, _gates in ((gated, gated_backward, True), (activated, activated_backward, False)):
    slower = partial(_torch_is_slower, _gates)
    _op.backend("torch", devices=("cpu", "cuda"), slower_than_next=slower, differentiable=True)(partial(_torch, _gates))
    _op.backend("cpp", **on_cpu)(partial(_cpp, _gates))
    _backward.backend("cpp", **on_cpu)(partial(_cpp_backward, _gates))
gated.backend("triton", **on_gpu)(_triton)
gated_backward.backend("triton", **on_gpu)(_triton_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


def _save(ctx, inputs, output):
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _gradient(backward: Op, ctx, dy):
    return backward(dy, *ctx.saved_tensors, ctx.activation), None


def _gradient_of_gradient(name: str, ctx, grad):
    raise BackendError(f'{name} is differentiable once, and more often under fastlm.use_backend({name}="torch")')


for _op, _backward in ((gated, gated_backward), (activated, activated_backward)):
    _op.gradient(save=_save)(partial(_gradient, _backward))
    _backward.gradient(save=lambda ctx, inputs, output: None)(partial(_gradient_of_gradient, _op.name))

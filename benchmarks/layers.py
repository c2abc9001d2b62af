"""Who competes in what stands between matrix products, forward and backward, beside PyTorch's own, eager and compiled.

    layer_norm, rms_norm     fastlm.nn.LayerNorm, RMSNorm         F.layer_norm, F.rms_norm
    … of a sum               the same with a residual             the same of x + residual; both give the sum too
    gated silu, …            fastlm.ops.gate                      f(gate) * up of x.chunk(2, -1)
    embedding                fastlm.embedding                     F.embedding, eager alone

By ideal bytes a norm moves 5 numbers an element (reads x, dy, x again; writes y, dx), of a sum 8, a gate 8 for each
element of y, and an activation 5.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import compare
from torch import Tensor

import fastlm
from fastlm.nn import LayerNorm, RMSNorm
from fastlm.ops.gate import PYTORCHS, activated, gated

ROWS, NARROW, WIDE = 8192, 768, 3072


class Layer(NamedTuple):
    """ours and PyTorch's function of the inputs; the inputs' widths, rows each; numbers moved an element of output."""

    ours: Callable[..., tuple[Tensor, ...]]
    torch: Callable[..., tuple[Tensor, ...]]
    widths: tuple[int, ...]
    numbers: int


def _norm(module: Callable, function: Callable, residual: bool) -> Callable[[int], Layer]:
    def make(scale: int) -> Layer:
        D = NARROW // scale
        norm = module(D, eps=1e-5)

        def theirs(x, *others):
            s = x + others[0] if others else x
            return (function(s, norm), s)[: 1 + len(others)]

        ours = norm if residual else lambda x: (norm(x),)
        return Layer(ours, theirs, (D,) * (1 + residual), 8 if residual else 5)

    return make


def _gate(activation: str) -> Callable[[int], Layer]:
    def theirs(x):
        gate, up = x.chunk(2, -1)
        return (PYTORCHS[activation](gate) * up,)

    return lambda scale: Layer(lambda x: (gated(x, activation),), theirs, (2 * WIDE // scale,), 8)


def _activation(name: str) -> Callable[[int], Layer]:
    ours, theirs = lambda x: (activated(x, name),), lambda x: (PYTORCHS[name](x),)
    return lambda scale: Layer(ours, theirs, (WIDE // scale,), 5)


_layer_norm = lambda x, norm: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
_rms_norm = lambda x, norm: F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
LAYERS = {
    "layer_norm": _norm(LayerNorm, _layer_norm, False),
    "layer_norm of a sum": _norm(LayerNorm, _layer_norm, True),
    "rms_norm": _norm(RMSNorm, _rms_norm, False),
    "rms_norm of a sum": _norm(RMSNorm, _rms_norm, True),
    **{f"gated {name}": _gate(name) for name in ("silu", "gelu", "gelu_tanh", "relu")},
    "gelu_tanh": _activation("gelu_tanh"),
}


def measure(name: str, dtype: torch.dtype, clock: str, copy: float, scale: int, **limits) -> tuple[dict, Callable]:
    """Check, then time: a row of results, and ours. scale: by which sizes are divided, to try the benchmark."""
    rows, layer = ROWS // scale, LAYERS[name](scale)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, width, generator=g).to(dtype).requires_grad_() for width in layer.widths]
    outputs = layer.torch(*inputs)
    grads = [torch.randn(y.shape, generator=g).to(dtype) for y in outputs]

    def step(function: Callable) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(*inputs), inputs, grads)

    ours, theirs = step(layer.ours), step(layer.torch)
    torch.testing.assert_close((*layer.ours(*inputs), *ours()), (*outputs, *theirs()), **close(dtype))
    moved = layer.numbers * outputs[0].numel() * dtype.itemsize
    facts = {"kind": "layers", "step": name, "shapes": f"{rows}×{outputs[0].shape[-1]} {str(dtype)[6:]}", "copy": copy}
    compiled = lambda: [step(torch.compile(layer.torch, dynamic=False))]
    contestants = {"fastlm": lambda: [ours], "torch": lambda: [theirs], "compiled": compiled}
    return compare(contestants, clock, **limits).row(**facts, bytes=moved, clock=clock), ours


def close(dtype: torch.dtype) -> dict:
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-1}


def measure_embedding(N: int, V: int, D: int, dtype: torch.dtype, clock: str, copy: float, **limits):
    """Likewise, of N tokens whose frequencies are Zipf's. What has to be moved: rows are read and written, their
    gradients read, and the table's written.
    """
    g = torch.Generator().manual_seed(0)
    ids = torch.exp(torch.rand(N, generator=g) * math.log(V)).long() - 1
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    dy = torch.randn(N, D, generator=g).to(dtype)
    steps = {
        "fastlm": lambda: torch.autograd.grad(fastlm.embedding(ids, weight), weight, dy),
        "torch": lambda: torch.autograd.grad(F.embedding(ids, weight), weight, dy),
    }
    truth = torch.zeros(V, D).index_add_(0, ids, dy.float())
    torch.testing.assert_close(steps["fastlm"]()[0].float(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    facts = {"kind": "layers", "step": "embedding", "shapes": f"{N} of {V}×{D} {str(dtype)[6:]}", "copy": copy}
    contestants = {name: lambda step=step: [step] for name, step in steps.items()}
    row = compare(contestants, clock, **limits).row(**facts, bytes=(3 * N + V) * D * dtype.itemsize, clock=clock)
    return row, steps["fastlm"]

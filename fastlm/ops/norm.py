"""Layer norm and RMS norm of rows, with the residual branch's addition in the same pass.

    s = x + residual, in the wider of their dtypes; x itself without a residual
    layer_norm    n = (s - mean) · rstd     rstd = 1 / √(mean_j (s_j - mean)² + eps)             Ba et al. 2016
    rms_norm      n = s · rstd              rstd = 1 / √(mean_j s_j² + eps)                      Zhang and Sennrich 2019
    y = n · (weight + weight_offset) + bias

The arithmetic is fp32 (fp64 for fp64 s), and y has s's dtype. Statistics are of s as it is stored, so that a gradient
finds the same n again: what is kept for it is s, rstd and, of layer_norm, mean.

    x, residual [..., D]   weight, bias [D]          y, s [..., D]   statistics [2, rows]: mean, rstd; [1, rows]: rstd
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import BackendError, op

LONGEST = 16384  # elements of a row that a Triton program holds

# ---------------------------------------------------------------------------------------------------------------------
# Definition


class Arguments(NamedTuple):
    """The ops' arguments by name, in their order.

    weight_offset is 1 for Gemma, whose weights start at 0, else 0. rounds_first: n is rounded to s's dtype before the
    weight multiplies it, as in Llama and T5.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    weight_offset: float
    rounds_first: bool


class Saved(NamedTuple):
    """What a gradient is made from: of y, of s (None: none), and what forward kept. of_bias: whether bias's is made."""

    dy: Tensor
    ds: Tensor | None
    s: Tensor
    statistics: Tensor
    weight: Tensor | None
    weight_offset: float
    of_bias: bool


@op
def layer_norm(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, s, statistics) by the file's formula; s is empty without a residual, for it is x."""
    return _normed(a, centred=True)


@op
def rms_norm(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, s, statistics) by the file's formula; s is empty without a residual, for it is x."""
    return _normed(a, centred=False)


@op(gradient_of=layer_norm)
def layer_norm_backward(a: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of s (and so of x and of residual), weight and bias, these in fp32 (fp64); empty where none is wanted.

    With g = dy · (weight + weight_offset), rstd · (g - mean_j g_j - n · mean_j g_j n_j) + ds, Σ_rows dy · n and
    Σ_rows dy.
    """
    return _gradients(a)


@op(gradient_of=rms_norm)
def rms_norm_backward(a: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """As `layer_norm_backward`, without mean_j g_j."""
    return _gradients(a)


def _normed(a: Arguments, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    s = (a.x if a.residual is None else a.x + a.residual).contiguous()
    n = s.to(_wide(s))
    means = [n.mean(-1, keepdim=True)] if centred else []
    n = n - means[0] if centred else n
    rstd = (n.square().mean(-1, keepdim=True) + a.eps).rsqrt()
    n = n * rstd
    y = n.to(s.dtype).to(n.dtype) if a.rounds_first else n
    y = y if a.weight is None else y * (a.weight.to(n.dtype) + a.weight_offset)
    y = y if a.bias is None else y + a.bias.to(n.dtype)
    statistics = torch.stack([x.flatten() for x in (*means, rstd)])
    return y.to(s.dtype), s.new_empty(0) if a.residual is None else s, statistics


def _gradients(a: Saved) -> tuple[Tensor, Tensor, Tensor]:
    D, wide = a.s.shape[-1], a.statistics.dtype
    dy, s = a.dy.reshape(-1, D).to(wide), a.s.reshape(-1, D).to(wide)
    *means, rstd = a.statistics[..., None].unbind()
    n = (s - means[0] if means else s) * rstd
    g = dy if a.weight is None else dy * (a.weight.to(wide) + a.weight_offset)
    dx = g - n * (g * n).mean(-1, keepdim=True)
    dx = rstd * (dx - g.mean(-1, keepdim=True) if means else dx)
    dx = dx if a.ds is None else dx + a.ds.reshape(-1, D).to(wide)
    dweight = s.new_empty(0) if a.weight is None else (dy * n).sum(0)
    return dx.to(a.s.dtype).view(a.s.shape), dweight, dy.sum(0) if a.of_bias else s.new_empty(0)


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Of s, and so of y."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def default_eps(dtype: torch.dtype) -> float:
    """torch.nn.RMSNorm's for s of a dtype: the least step from 1 in which it computes, fp32 for 16 bits."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Backends: PyTorch's own where a call takes the host longer than the norm, and in fp64


def _torch_refuses(centred: bool, a: Arguments) -> str | None:
    if a.weight_offset or (a.rounds_first and a.x.dtype.itemsize < 4):
        return "PyTorch's norms add nothing to the weight, and round at the end alone"
    if not centred and a.bias is not None:
        return "PyTorch's rms_norm has no bias"
    dtype = sum_dtype(a.x, a.residual)
    served = (dtype, torch.float32) if centred else (dtype,)
    if a.weight is not None and a.weight.dtype not in served:
        return f"PyTorch norms {dtype} with a weight in that dtype{' or fp32' * centred}, not {a.weight.dtype}"
    return None


def _torch_is_slower(centred: bool, a: Arguments) -> bool:
    """But for calls so small that the host's time counts, by a sweep in benchmarks/FACTS.md."""
    if a.x.dtype == torch.float64:
        return False
    of_layer_norm = 2**19 if a.x.dtype.itemsize < 4 else 2**22 if a.residual is None else 2**21
    smallest = of_layer_norm if centred else 2**14
    return a.x.device.type != "cpu" or (a.x.numel() >= smallest and native.cpp_is_built())


def _torch(centred: bool, a: Arguments) -> tuple[Tensor, Tensor, None]:
    s = a.x if a.residual is None else a.x + a.residual
    if centred:
        return F.layer_norm(s, s.shape[-1:], a.weight, a.bias, a.eps), s, None
    return F.rms_norm(s, s.shape[-1:], a.weight, a.eps), s, None


def _refuses(a: Arguments | Saved) -> str | None:
    for name, x in a._asdict().items():
        if isinstance(x, Tensor) and x.dtype not in native.DTYPES:
            return f"{name} is {x.dtype}; served are fp32, bf16 and fp16"
    return None


def _triton(centred: bool, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    from fastlm.kernels.norm import forward

    return forward(a, centred)


def _triton_backward(a: Saved) -> tuple[Tensor, Tensor, Tensor]:
    from fastlm.kernels.norm import backward

    return backward(a)


def _triton_refuses(a: Arguments | Saved) -> str | None:
    x = a.x if isinstance(a, Arguments) else a.s
    if x.shape[-1] > LONGEST:
        return f"x is {list(x.shape)}; served are rows of at most {LONGEST} elements"
    return _refuses(a)


def _cpp(centred: bool, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = (None if t is None else t.contiguous() for t in (a.x, a.residual))
    dtype = sum_dtype(x, residual)
    y, s = x.new_empty(x.shape, dtype=dtype), None if residual is None else x.new_empty(x.shape, dtype=dtype)
    statistics = x.new_empty(1 + centred, x.shape[:-1].numel(), dtype=torch.float32)
    tensors = native.named(x=x, residual=residual, weight=_dense(a.weight), bias=_dense(a.bias), y=y, s=s)
    native.cpu().norm(
        tensors, statistics.data_ptr(), centred, statistics.shape[1], x.shape[-1],
        a.eps, a.weight_offset, a.rounds_first, torch.get_num_threads(),
    )  # fmt: skip
    return y, x.new_empty(0) if s is None else s, statistics


def _cpp_backward(a: Saved) -> tuple[Tensor, Tensor, Tensor]:
    dy, ds, weight = (_dense(t) for t in (a.dy, a.ds, a.weight))
    dx, D = a.s.new_empty(a.s.shape), a.s.shape[-1]
    dweight, dbias = (a.statistics.new_empty(D if wanted else 0) for wanted in (weight is not None, a.of_bias))
    tensors = native.named(dy=dy, ds=ds, s=a.s.contiguous(), weight=weight, dx=dx)
    native.cpu().norm_backward(
        tensors, a.statistics.data_ptr(), len(a.statistics) == 2, a.statistics.shape[1], D,
        a.weight_offset, *(x.data_ptr() if len(x) else 0 for x in (dweight, dbias)), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


for _op, _centred in ((layer_norm, True), (rms_norm, False)):
    _op.backend(
        "torch",
        devices=("cpu", "cuda"),
        refuses=partial(_torch_refuses, _centred),
        slower_than_next=partial(_torch_is_slower, _centred),
        differentiable=True,
    )(partial(_torch, _centred))
    _op.backend("triton", devices=("cuda",), unavailable=native.triton_missing, refuses=_triton_refuses)(
        partial(_triton, _centred)
    )
    _op.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)(partial(_cpp, _centred))
for _op in (layer_norm_backward, rms_norm_backward):
    _op.backend("triton", devices=("cuda",), unavailable=native.triton_missing, refuses=_triton_refuses)(
        _triton_backward
    )
    _op.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)(_cpp_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of s, whose gradient is none where only y is read
    (a,), (_, s, statistics) = inputs, output
    ctx.save_for_backward(a.x if a.residual is None else s, statistics, a.weight)
    ctx.weight_offset, ctx.dtypes = a.weight_offset, [None if t is None else t.dtype for t in a[:4]]


def _gradient(backward, ctx, dy, ds, of_statistics):
    s, statistics, weight = ctx.saved_tensors
    of_x, of_residual, of_weight, of_bias = ctx.dtypes
    ds = None if of_residual is None else ds
    if dy is None:
        dx, dweight, dbias = ds, None, None
    else:
        dx, dweight, dbias = backward(Saved(dy, ds, s, statistics, weight, ctx.weight_offset, of_bias is not None))
    cast = lambda x, dtype: None if x is None or dtype is None else x.to(dtype)
    return (
        Arguments(
            cast(dx, of_x), cast(dx, of_residual), cast(dweight, of_weight), cast(dbias, of_bias), None, None, None
        ),
    )


def _gradient_of_gradient(forward: str, ctx, *grads):
    raise BackendError(f'{forward} is differentiable once, and more often under fastlm.use_backend({forward}="torch")')


for _forward, _backward in ((layer_norm, layer_norm_backward), (rms_norm, rms_norm_backward)):
    _forward.gradient(save=_save)(partial(_gradient, _backward))
    _backward.gradient(save=lambda ctx, inputs, output: None)(partial(_gradient_of_gradient, _forward.name))

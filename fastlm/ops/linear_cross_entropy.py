"""Cross entropy of a linear layer's logits that are never there as a whole: rows come in chunks.

    x = hidden weightᵀ + bias      z = c · tanh(x / c) / T, or x / T without a softcap c      lse = log Σ_j exp(z_j)
    loss = lse - (1 - ε) z_label - ε mean_j z_j + ζ lse²

for each row with a target; a row whose label is ignore_index gives zeros, and no product is made for it. ε is the label
smoothing of Szegedy et al. 2016, ζ the z-loss of Chowdhery et al. 2022 (PaLM), c the softcap of Gemma 2.

There are two ops. `linear_cross_entropy` has a loss for each row, and whoever weighs them: its gradient makes a chunk's
logits anew, so that four products take the place of three. `summed_linear_cross_entropy` has their sum, whose gradient
is known but for a factor while a chunk's logits are there (Hsu et al. 2024, Liger): three products, and the gradients'
own memory from forward on.

    hidden [N, D]  weight [V, D]  bias [V]  labels [N] int          loss, lse [N] fp32 (fp64 for fp64 hidden)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import BackendError, op
from fastlm.ops.logits import Arguments, Sums, chunks, zeros_of_rows

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op
def linear_cross_entropy(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (loss [N], lse [N]): the file's formula in fp32 (fp64 for fp64 hidden), whatever dtype weight has."""
    return _losses(a, PYTORCH)


@op(gradient_of=linear_cross_entropy)
def linear_cross_entropy_backward(
    grad: Tensor, grad_lse: Tensor, lse: Tensor, a: Arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty without one) for grad = dL/dloss [N] and grad_lse = dL/dlse [N].

    With p = exp(z - lse), dz_j = (grad (1 + 2 ζ lse) + grad_lse) p_j - grad ((1 - ε) [j = label] + ε / V).
    Chunks add to sums of fp32 in order, so that bits are the same at every run.
    """
    return _gradients(grad, grad_lse, lse, a, PYTORCH)


@op
def summed_linear_cross_entropy(
    a: Arguments, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (sum of loss over rows, and its gradients of hidden, weight and bias), all in fp32 (fp64 for fp64 hidden).

    of_hidden, of_weight: which gradients are wanted; those that are not, and bias's without a bias, are empty.
    """
    return _sum_and_gradients(a, of_hidden, of_weight, PYTORCH)


class Rows(NamedTuple):
    """What is done to a chunk's logits x [rows, V] between its products.

    measure(x, labels, a) → (lse [rows], (1 - ε) z_label + ε mean_j z_j [rows])
    gradient(x, labels, lse, scale, g, a) → the gradient of scale · lse - g · the second one, in x's place
    """

    measure: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def _losses(a: Arguments, by: Rows) -> tuple[Tensor, Tensor]:
    loss, lse = zeros_of_rows(a), zeros_of_rows(a)
    for rows, x in chunks(a):
        of_rows, wanted = by.measure(x, a.labels[rows], a)
        lse[rows], loss[rows] = of_rows, of_rows - wanted + a.z_loss * of_rows.square()
    return loss, lse


def _gradients(grad: Tensor, grad_lse: Tensor, lse: Tensor, a: Arguments, by: Rows) -> tuple[Tensor, Tensor, Tensor]:
    sums = Sums.zeros(a)
    for rows, x in chunks(a):
        g, of_rows = grad[rows].to(lse.dtype), lse[rows]
        scale = g * (1 + 2 * a.z_loss * of_rows) + grad_lse[rows].to(lse.dtype)
        sums.add(a, rows, by.gradient(x, a.labels[rows], of_rows, scale, g, a))
    return sums.like(a)


def _sum_and_gradients(
    a: Arguments, of_hidden: bool, of_weight: bool, by: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, sums = zeros_of_rows(a).new_zeros(()), Sums.zeros(a, of_hidden, of_weight)
    for rows, x in chunks(a):
        lse, wanted = by.measure(x, a.labels[rows], a)
        total += (lse - wanted + a.z_loss * lse.square()).sum()
        scale = 1 + 2 * a.z_loss * lse
        sums.add(a, rows, by.gradient(x, a.labels[rows], lse, scale, torch.ones_like(lse), a))
    return total, *sums


def _capped(x: Tensor, a: Arguments) -> Tensor:
    return (x / a.softcap).tanh_().mul_(a.softcap / a.temperature) if a.softcap else x / a.temperature


def _measure(x: Tensor, labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    z = _capped(x, a)
    wanted = (1 - a.label_smoothing) * z.gather(1, labels[:, None]).squeeze(1)
    return z.logsumexp(-1), wanted + a.label_smoothing * z.mean(-1) if a.label_smoothing else wanted


def _gradient(x: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, g: Tensor, a: Arguments) -> Tensor:
    z = _capped(x, a)
    dz = torch.sub(z, lse[:, None], out=x).exp_().mul_(scale[:, None])
    if a.label_smoothing:
        dz.sub_(g[:, None] * (a.label_smoothing / len(a.weight)))
    dz.scatter_add_(1, labels[:, None], (a.label_smoothing - 1) * g[:, None])
    if a.softcap:
        dz.mul_(1 - (z * (a.temperature / a.softcap)).square())
    return dz.div_(a.temperature)


PYTORCH = Rows(_measure, _gradient)

# how many rows have a target is known only where labels are, which fake tensors have not
linear_cross_entropy.torch_op.register_fake(
    lambda *values: tuple(zeros_of_rows(a) for a in 2 * [Arguments._make(values)])
)
linear_cross_entropy_backward.torch_op.register_fake(
    lambda grad, grad_lse, lse, hidden, weight, bias, *others: (
        hidden.new_empty(hidden.shape), weight.new_empty(weight.shape),
        lse.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )
)  # fmt: skip
summed_linear_cross_entropy.torch_op.register_fake(
    lambda *values: tuple(
        zeros_of_rows(a).new_empty(shape)
        for a in [Arguments._make(values[:-2])]
        for shape in ((), *Sums.shapes(a, *values[-2:]))
    )
)


# ---------------------------------------------------------------------------------------------------------------------
# Backends: the same products, and what is between them in two passes of C++


def _measure_by_cpp(x: Tensor, labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    lse, wanted, labels = x.new_empty(len(x)), x.new_empty(len(x)), labels.long()
    native.cpu().logits_measure(
        x.data_ptr(), labels.data_ptr(), lse.data_ptr(), wanted.data_ptr(), *x.shape,
        (a.softcap, a.temperature, a.label_smoothing), torch.get_num_threads(),
    )  # fmt: skip
    return lse, wanted


def _gradient_by_cpp(x: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, g: Tensor, a: Arguments) -> Tensor:
    labels, lse, scale, g = labels.long(), lse.contiguous(), scale.contiguous(), g.contiguous()
    native.cpu().logits_gradient(
        x.data_ptr(), labels.data_ptr(), lse.data_ptr(), scale.data_ptr(), g.data_ptr(), *x.shape,
        (a.softcap, a.temperature, a.label_smoothing), torch.get_num_threads(),
    )  # fmt: skip
    return x


CPP = Rows(_measure_by_cpp, _gradient_by_cpp)


def _refuses(*args) -> str | None:
    hidden = next(x for x in args if isinstance(x, Arguments)).hidden
    return None if hidden.dtype in native.DTYPES else f"hidden is {hidden.dtype}; served are fp32, bf16 and fp16"


for _op, _run in (
    (linear_cross_entropy, _losses),
    (linear_cross_entropy_backward, _gradients),
    (summed_linear_cross_entropy, _sum_and_gradients),
):
    _op.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)(partial(_run, by=CPP))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

ONCE = "linear_cross_entropy is differentiable once; F.cross_entropy(F.linear(hidden, weight), labels) is more often"


def _save(ctx, inputs, output):
    (a,) = inputs
    ctx.save_for_backward(output[1], a.hidden, a.weight, a.bias, a.labels)
    ctx.numbers = a._replace(hidden=None, weight=None, bias=None, labels=None)


@linear_cross_entropy.gradient(save=_save)
def _(ctx, grad, grad_lse):
    lse, hidden, weight, bias, labels = ctx.saved_tensors
    a = ctx.numbers._replace(hidden=hidden, weight=weight, bias=bias, labels=labels)
    *made, d_bias = linear_cross_entropy_backward(grad, grad_lse, lse, a)
    return (Arguments(*made, None if bias is None else d_bias, *6 * [None]),)


@linear_cross_entropy_backward.gradient(save=lambda ctx, inputs, output: None)
def _(ctx, *grads):
    raise BackendError(ONCE)


def _save_sums(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # those of the gradients, which nobody differentiates
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[0].bias is not None, *inputs[1:]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[0][:3]]


@summed_linear_cross_entropy.gradient(save=_save_sums)
def _(ctx, grad, *of_gradients):
    if any(x is not None for x in of_gradients):
        raise BackendError(ONCE)
    of_bias, of_hidden, of_weight = ctx.wanted
    hidden, weight, bias = (
        (x * grad).to(dtype) if wanted and grad is not None else None
        for x, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, (of_hidden, of_weight, of_bias), strict=True)
    )
    made = dict(hidden=hidden, weight=weight, bias=bias)
    return Arguments(**dict.fromkeys(Arguments._fields) | made), None, None

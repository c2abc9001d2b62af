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
from fastlm.backends.eager import observed
from fastlm.ops import ranks
from fastlm.ops.logits import Arguments, Sums, chunks, has_target, zeros_of_rows

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
    """What is done to a chunk of products x [rows, V], to which bias, softcap and temperature are yet to come. Labels
    count from x's first word, and those outside of it are other ranks'.

    measure(x, labels, a) → (lse [rows], (1 - ε) z_label + ε / words Σ_j z_j [rows], of the words here)
    gradient(x, labels, lse, scale, g, a) → the gradient of scale · lse - g · the second one, in x's place
    lose(x, labels, a) → (loss [rows], its gradient in x's place), where all words are here, and all rows have a target
        but while a CUDA graph is captured; None: by the two above
    """

    measure: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    lose: Callable[..., tuple[Tensor, Tensor]] | None = None


def _losses(a: Arguments, by: Rows) -> tuple[Tensor, Tensor]:
    loss, lse = zeros_of_rows(a), zeros_of_rows(a)
    for rows, x in chunks(a):
        of_rows, wanted = _measured(x, a.labels[rows], a, by)
        lse[rows], loss[rows] = of_rows, of_rows - wanted + a.z_loss * of_rows.square()
    return tuple(made.masked_fill_(~has_target(a, a.labels), 0) for made in (loss, lse))


def _gradients(grad: Tensor, grad_lse: Tensor, lse: Tensor, a: Arguments, by: Rows) -> tuple[Tensor, Tensor, Tensor]:
    sums = Sums.zeros(a)
    grad, grad_lse = (g.to(lse.dtype).masked_fill(~has_target(a, a.labels), 0) for g in (grad, grad_lse))
    scale = grad * (1 + 2 * a.z_loss * lse) + grad_lse
    for rows, x in chunks(a):
        sums.add(a, rows, by.gradient(x, a.labels[rows] - a.first, lse[rows], scale[rows], grad[rows], a))
    return sums.over_ranks(a).like(a)


def _sum_and_gradients(
    a: Arguments, of_hidden: bool, of_weight: bool, by: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, sums = zeros_of_rows(a).new_zeros(()), Sums.zeros(a, of_hidden, of_weight)
    for rows, x in chunks(a):
        loss, dx = _loss_and_gradient(x, a.labels[rows], a, by)
        total += loss.sum()
        sums.add(a, rows, dx)
    return total, *sums.over_ranks(a)


def _loss_and_gradient(x: Tensor, labels: Tensor, a: Arguments, by: Rows) -> tuple[Tensor, Tensor]:
    if by.lose is not None and not a.group:
        return by.lose(x, labels, a)
    lse, wanted = _measured(x, labels, a, by)
    g = has_target(a, labels).to(lse.dtype)
    loss = (lse - wanted + a.z_loss * lse.square()).where(g > 0, 0)
    return loss, by.gradient(x, labels - a.first, lse, g * (1 + 2 * a.z_loss * lse), g, a)


def _measured(x: Tensor, labels: Tensor, a: Arguments, by: Rows) -> tuple[Tensor, Tensor]:
    """Of all words, be they here or on other ranks, whose parts are rounded once and put together in fp64."""
    made = by.measure(x, labels - a.first, a)
    if not a.group:
        return made
    lse, wanted = ranks.gathered(torch.stack(made), a.group).double().unbind(1)
    return tuple(x.to(made[0].dtype) for x in (lse.logsumexp(0), wanted.sum(0)))


def _scores(x: Tensor, a: Arguments) -> Tensor:
    """z of the products x."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x if a.bias is None else x + a.bias
    return (x / a.softcap).tanh_().mul_(a.softcap / a.temperature) if a.softcap else x / a.temperature


def _places(labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """(whether a label is a word here, a word here that is the label if it is)"""
    here = (labels >= 0) & (labels < len(a.weight))
    return here, labels.where(here, 0)


def _measure(x: Tensor, labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    z, (here, labels) = _scores(x, a), _places(labels, a)
    wanted = (1 - a.label_smoothing) * z.gather(1, labels[:, None]).squeeze(1).where(here, 0)
    return z.logsumexp(-1), wanted + a.label_smoothing / a.words * z.sum(-1) if a.label_smoothing else wanted


def _gradient(x: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, g: Tensor, a: Arguments) -> Tensor:
    z, (here, labels) = _scores(x, a), _places(labels, a)
    dz = (z - lse[:, None]).exp_().mul_(scale[:, None])
    if a.label_smoothing:
        dz.sub_(g[:, None] * (a.label_smoothing / a.words))
    dz.scatter_add_(1, labels[:, None], ((a.label_smoothing - 1) * g).where(here, 0)[:, None])
    if a.softcap:
        dz.mul_(1 - (z * (a.temperature / a.softcap)).square())
    return x.copy_(dz.div_(a.temperature))


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
# Backends: the same products, and what is between them in two passes of C++, or in one kernel of Triton


def _measure_by_cpp(x: Tensor, labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    lse, wanted = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    _run_cpp(native.cpu().logits_measure, x, labels, (lse.data_ptr(), wanted.data_ptr()), a)
    return lse, wanted


def _gradient_by_cpp(x: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, g: Tensor, a: Arguments) -> Tensor:
    given = [values.contiguous() for values in (lse, scale, g)]
    _run_cpp(native.cpu().logits_gradient, x, labels, [values.data_ptr() for values in given], a)
    return x


def _lose_by_cpp(x: Tensor, labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    loss = x.new_empty(len(x), dtype=torch.float32)
    _run_cpp(native.cpu().logits_lose, x, labels, loss.data_ptr(), a, a.z_loss)
    return loss, x


def _run_cpp(launch: Callable, x: Tensor, labels: Tensor, of_rows, a: Arguments, *others: float) -> None:
    bias = None if a.bias is None else a.bias.float().contiguous()
    labels = labels.contiguous()
    launch(
        native.view(x), native.DTYPES[x.dtype], native.address(bias), labels.data_ptr(), of_rows, a.words,
        (a.softcap, a.temperature, a.label_smoothing), *others, torch.get_num_threads(),
    )  # fmt: skip


def _measure_by_triton(x: Tensor, labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    from fastlm.kernels.logits import measure

    return measure(x, labels, a)


def _gradient_by_triton(x: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, g: Tensor, a: Arguments) -> Tensor:
    from fastlm.kernels.logits import gradient

    return gradient(x, labels, (lse, scale, g), a)


def _lose_by_triton(x: Tensor, labels: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    from fastlm.kernels.logits import lose

    return lose(x, labels, a)


CPP = Rows(_measure_by_cpp, _gradient_by_cpp, _lose_by_cpp)
TRITON = Rows(_measure_by_triton, _gradient_by_triton, _lose_by_triton)


def _refuses(*args) -> str | None:
    hidden = next(x for x in args if isinstance(x, Arguments)).hidden
    return None if hidden.dtype in native.DTYPES else f"hidden is {hidden.dtype}; served are fp32, bf16 and fp16"


for _op, _run in (
    (linear_cross_entropy, _losses),
    (linear_cross_entropy_backward, _gradients),
    (summed_linear_cross_entropy, _sum_and_gradients),
):
    _op.backend("triton", devices=("cuda",), unavailable=native.triton_missing, refuses=_refuses)(
        partial(_run, by=TRITON)
    )
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
    return (_for_tensors(*made, None if bias is None else d_bias),)


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
        _times(x, grad).to(dtype) if wanted and grad is not None else None
        for x, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, (of_hidden, of_weight, of_bias), strict=True)
    )
    return _for_tensors(hidden, weight, bias), None, None


def _times(saved: Tensor, grad: Tensor) -> Tensor:
    """saved · grad: in saved's memory where a backward pass is the graph's last and nobody looks on at it."""
    last = not observed((saved, grad)) and not torch._C._autograd._get_current_graph_task_keep_graph()
    return saved.mul_(grad) if last else saved * grad


def _for_tensors(*gradients: Tensor | None) -> Arguments:
    """Gradients of hidden, weight and bias in the place of these, and none of the others."""
    return Arguments(*gradients, *(len(Arguments._fields) - len(gradients)) * [None])

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

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import BackendError, op

# Logits that are there at a time: the most of so many bytes, so many rows, without which products run at two thirds of
# their speed, and a twentieth of all rows, for weight's gradient is read and written for each chunk.
CHUNK, ROWS, CHUNKS = 12 * 2**20, 192, 20
TILE = 4 * 2**20  # bytes of a 16-bit weight that are there in fp32 at a time

# ---------------------------------------------------------------------------------------------------------------------
# Definition


class Arguments(NamedTuple):
    """The op's arguments by name, in its order. softcap 0: none."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    temperature: float


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
    loss, lse = _zeros(a), _zeros(a)
    for rows, x in _chunks(a):
        of_rows, wanted = by.measure(x, a.labels[rows], a)
        lse[rows], loss[rows] = of_rows, of_rows - wanted + a.z_loss * of_rows.square()
    return loss, lse


def _gradients(grad: Tensor, grad_lse: Tensor, lse: Tensor, a: Arguments, by: Rows) -> tuple[Tensor, Tensor, Tensor]:
    sums = Sums.zeros(a)
    for rows, x in _chunks(a):
        g, of_rows = grad[rows].to(lse.dtype), lse[rows]
        scale = g * (1 + 2 * a.z_loss * of_rows) + grad_lse[rows].to(lse.dtype)
        sums.add(a, rows, by.gradient(x, a.labels[rows], of_rows, scale, g, a))
    return sums.like(a)


def _sum_and_gradients(
    a: Arguments, of_hidden: bool, of_weight: bool, by: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, sums = _zeros(a).new_zeros(()), Sums.zeros(a, of_hidden, of_weight)
    for rows, x in _chunks(a):
        lse, wanted = by.measure(x, a.labels[rows], a)
        total += (lse - wanted + a.z_loss * lse.square()).sum()
        scale = 1 + 2 * a.z_loss * lse
        sums.add(a, rows, by.gradient(x, a.labels[rows], lse, scale, torch.ones_like(lse), a))
    return total, *sums


class Sums(NamedTuple):
    """Gradients of hidden, weight and bias while chunks of rows add to them in order; empty where none is wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def zeros(a: Arguments, of_hidden: bool = True, of_weight: bool = True) -> "Sums":
        zeros = lambda *shape: _zeros(a).new_zeros(shape)
        return Sums(
            zeros(*a.hidden.shape) if of_hidden else zeros(0),
            zeros(*a.weight.shape) if of_weight else zeros(0),
            zeros(0 if a.bias is None else len(a.weight)),
        )

    def add(self, a: Arguments, rows: Tensor, dx: Tensor) -> None:
        """Add a chunk's, of whose logits dx [rows, V] is the gradient."""
        h = a.hidden[rows].to(dx.dtype)
        d_h = torch.zeros_like(h)
        for begin, w in _tiles(a):
            part = dx[:, begin : begin + len(w)]
            if len(self.hidden):
                d_h.addmm_(part, w)
            if len(self.weight):
                self.weight[begin : begin + len(w)].addmm_(part.mT, h)
        if len(self.hidden):
            self.hidden[rows] = d_h
        if a.bias is not None:
            self.bias.add_(dx.sum(0))

    def like(self, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of what they are gradients of."""
        bias = self.bias if a.bias is None else self.bias.to(a.bias.dtype)
        return self.hidden.to(a.hidden.dtype), self.weight.to(a.weight.dtype), bias


def _zeros(a: Arguments) -> Tensor:
    return a.hidden.new_zeros(len(a.hidden), dtype=torch.promote_types(a.hidden.dtype, torch.float32))


def _chunks(a: Arguments) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices of rows with a target, their x [rows, V] in one buffer), chunk by chunk."""
    wide = torch.promote_types(a.hidden.dtype, torch.float32)
    V = len(a.weight)
    targets = (a.labels != a.ignore_index).nonzero().squeeze(1)
    together = max(CHUNK // (V * wide.itemsize), ROWS, len(targets) // CHUNKS)
    buffer = a.hidden.new_empty(min(together, len(targets)), V, dtype=wide)
    for rows in targets.split(together):
        if len(rows) == 0:
            return
        h, x = a.hidden[rows].to(wide), buffer[: len(rows)]
        for begin, w in _tiles(a):
            torch.mm(h, w.mT, out=x[:, begin : begin + len(w)])
        yield rows, x if a.bias is None else x.add_(a.bias)


def _tiles(a: Arguments) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of weight in hidden's wide dtype): the weight itself where that is its own."""
    wide = torch.promote_types(a.hidden.dtype, torch.float32)
    size = len(a.weight) if a.weight.dtype == wide else max(1, TILE // (a.weight.shape[1] * wide.itemsize))
    for begin in range(0, len(a.weight), size):
        yield begin, a.weight[begin : begin + size].to(wide)


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
linear_cross_entropy.torch_op.register_fake(lambda *values: tuple(_zeros(a) for a in 2 * [Arguments._make(values)]))
linear_cross_entropy_backward.torch_op.register_fake(
    lambda grad, grad_lse, lse, hidden, weight, bias, *others: (
        hidden.new_empty(hidden.shape), weight.new_empty(weight.shape),
        lse.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )
)  # fmt: skip
summed_linear_cross_entropy.torch_op.register_fake(
    lambda *values: (_zeros(a := Arguments._make(values[:-2])).new_empty(()), *Sums.zeros(a, *values[-2:]))
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

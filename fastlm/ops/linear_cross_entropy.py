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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends.dispatch import op

CHUNK = 12 * 2**20  # bytes of logits that are there at a time, or one row's; their logsumexp takes as many more
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
    loss, lse = _zeros(a), _zeros(a)
    for rows, logits in _chunks(a):
        z, _ = _capped(logits, a)
        lse[rows] = of_rows = z.logsumexp(-1)
        loss[rows] = of_rows - _wanted(z, rows, a) + a.z_loss * of_rows.square()
    return loss, lse


@op(gradient_of=linear_cross_entropy)
def linear_cross_entropy_backward(
    grad: Tensor, grad_lse: Tensor, lse: Tensor, a: Arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty without one) for grad = dL/dloss [N] and grad_lse = dL/dlse [N].

    With p = exp(z - lse), dz_j = (grad (1 + 2 ζ lse) + grad_lse) p_j - grad ((1 - ε) [j = label] + ε / V).
    Chunks add to sums of fp32 in order, so that bits are the same at every run.
    """
    sums = Sums.zeros(a)
    for rows, logits in _chunks(a):
        z, slope = _capped(logits, a)
        g, of_rows = grad[rows, None].to(lse.dtype), lse[rows, None]
        scale = g * (1 + 2 * a.z_loss * of_rows) + grad_lse[rows, None].to(lse.dtype)
        sums.add(a, rows, z.sub_(of_rows).exp_().mul_(scale), slope, g)
    return sums.like(a)


@op
def summed_linear_cross_entropy(
    a: Arguments, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (sum of loss over rows, and its gradients of hidden, weight and bias), all in fp32 (fp64 for fp64 hidden).

    of_hidden, of_weight: which gradients are wanted; those that are not, and bias's without a bias, are empty.
    """
    total, sums = _zeros(a).new_zeros(()), Sums.zeros(a, of_hidden, of_weight)
    for rows, logits in _chunks(a):
        z, slope = _capped(logits, a)
        wanted = _wanted(z, rows, a)[:, None]
        top = z.amax(-1, keepdim=True)
        shares = z.sub_(top).exp_().sum(-1, keepdim=True)
        lse = top + shares.log()
        total += (lse - wanted + a.z_loss * lse.square()).sum()
        sums.add(a, rows, z.mul_((1 + 2 * a.z_loss * lse) / shares), slope, torch.ones_like(lse))
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

    def add(self, a: Arguments, rows: Tensor, dz: Tensor, slope: Tensor | None, g: Tensor) -> None:
        """Add a chunk's. dz [rows, V]: what reaches z by lse; g [rows, 1]: the gradient of each row's loss."""
        if a.label_smoothing:
            dz.sub_(g * (a.label_smoothing / len(a.weight)))
        dz.scatter_add_(1, a.labels[rows, None], (a.label_smoothing - 1) * g)
        dx = dz.div_(a.temperature) if slope is None else dz.mul_(slope).div_(a.temperature)
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
    """(indices of rows with a target, their x [rows, V] in one buffer), CHUNK bytes at a time."""
    wide = torch.promote_types(a.hidden.dtype, torch.float32)
    V = len(a.weight)
    together = max(1, CHUNK // (V * wide.itemsize))
    targets = (a.labels != a.ignore_index).nonzero().squeeze(1)
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


def _wanted(z: Tensor, rows: Tensor, a: Arguments) -> Tensor:
    """(1 - ε) z_label + ε mean_j z_j of each row: [rows]."""
    at_label = (1 - a.label_smoothing) * z.gather(1, a.labels[rows, None]).squeeze(1)
    return at_label + a.label_smoothing * z.mean(-1) if a.label_smoothing else at_label


def _capped(x: Tensor, a: Arguments) -> tuple[Tensor, Tensor | None]:
    """(z in x's place, dz/dx · T, or None where that is 1)."""
    if not a.softcap:
        return x.div_(a.temperature), None
    bent = x.div_(a.softcap).tanh_()
    slope = 1 - bent.square()
    return bent.mul_(a.softcap / a.temperature), slope


# how many rows have a target is known only where labels are, which fake tensors have not
linear_cross_entropy.torch_op.register_fake(
    lambda *values: tuple(_zeros(a) for a in 2 * [Arguments._make(values)])
)  # fmt: skip
linear_cross_entropy_backward.torch_op.register_fake(
    lambda grad, grad_lse, lse, hidden, weight, bias, *others: (
        hidden.new_empty(hidden.shape), weight.new_empty(weight.shape),
        lse.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )
)  # fmt: skip
summed_linear_cross_entropy.torch_op.register_fake(
    lambda *values: (
        _zeros(a := Arguments._make(values[:-2])).new_empty(()), *Sums.zeros(a, *values[-2:])
    )
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def _save(ctx, inputs, output):
    (a,) = inputs
    ctx.save_for_backward(output[1], a.hidden, a.weight, a.bias, a.labels)
    ctx.numbers = a._replace(hidden=None, weight=None, bias=None, labels=None)


@linear_cross_entropy.gradient(save=_save)
def _(ctx, grad, grad_lse):
    lse, hidden, weight, bias, labels = ctx.saved_tensors
    a = ctx.numbers._replace(hidden=hidden, weight=weight, bias=bias, labels=labels)
    d_hidden, d_weight, d_bias = linear_cross_entropy_backward(grad, grad_lse, lse, a)
    made = dict(hidden=d_hidden, weight=d_weight, bias=None if bias is None else d_bias)
    return (Arguments(**dict.fromkeys(Arguments._fields) | made),)


def _save_sums(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # those of the gradients, which nobody differentiates
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[0].bias is not None, *inputs[1:]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[0][:3]]


@summed_linear_cross_entropy.gradient(save=_save_sums)
def _(ctx, grad, *of_gradients):
    if any(x is not None for x in of_gradients):
        raise RuntimeError('linear_cross_entropy is differentiable once; reduction="none" more often')
    of_bias, of_hidden, of_weight = ctx.wanted
    hidden, weight, bias = (
        (x * grad).to(dtype) if wanted and grad is not None else None
        for x, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, (of_hidden, of_weight, of_bias), strict=True)
    )
    made = dict(hidden=hidden, weight=weight, bias=bias)
    return Arguments(**dict.fromkeys(Arguments._fields) | made), None, None

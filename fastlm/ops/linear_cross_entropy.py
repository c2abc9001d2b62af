"""Cross entropy of a linear layer's logits that are never there as a whole: rows come in chunks.

    x = hidden weightᵀ + bias      z = c · tanh(x / c) / T, or x / T without a softcap c      lse = log Σ_j exp(z_j)
    loss = lse - (1 - ε) z_label - ε mean_j z_j + ζ lse²

for each row with a target; a row whose label is ignore_index gives zeros, and no product is made for it. ε is the label
smoothing of Szegedy et al. 2016, ζ the z-loss of Chowdhery et al. 2022 (PaLM), c the softcap of Gemma 2. The gradient
makes a chunk's logits anew, so that four products take the place of three, whoever weighs the rows' losses and how.

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
        z, label = _capped(logits, a)[0], a.labels[rows, None]
        lse[rows] = of_rows = z.logsumexp(-1)
        at_label = z.gather(1, label).squeeze(1)
        smooth = a.label_smoothing * z.mean(-1) if a.label_smoothing else 0.0
        loss[rows] = of_rows - (1 - a.label_smoothing) * at_label - smooth + a.z_loss * of_rows.square()
    return loss, lse


@op(gradient_of=linear_cross_entropy)
def linear_cross_entropy_backward(
    grad: Tensor, grad_lse: Tensor, lse: Tensor, a: Arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty without one) for grad = dL/dloss [N] and grad_lse = dL/dlse [N].

    With p = exp(z - lse), dz_j = (grad (1 + 2 ζ lse) + grad_lse) p_j - grad ((1 - ε) [j = label] + ε / V).
    Chunks add to sums of fp32 in order, so that bits are the same at every run.
    """
    sums = [torch.zeros_like(x, dtype=lse.dtype) for x in (a.hidden, a.weight)]
    d_hidden, d_weight = sums
    d_bias = lse.new_zeros(0 if a.bias is None else a.weight.shape[0])
    for rows, logits in _chunks(a):
        z, slope = _capped(logits, a)
        g, of_rows = grad[rows, None].to(lse.dtype), lse[rows, None]
        scale = g * (1 + 2 * a.z_loss * of_rows) + grad_lse[rows, None].to(lse.dtype)
        dx = z.sub_(of_rows).exp_().mul_(scale)
        if a.label_smoothing:
            dx.sub_(g * (a.label_smoothing / a.weight.shape[0]))
        dx.scatter_add_(1, a.labels[rows, None], (a.label_smoothing - 1) * g)
        dx = dx.div_(a.temperature) if slope is None else dx.mul_(slope).div_(a.temperature)
        h, d_h = a.hidden[rows].to(lse.dtype), lse.new_zeros(len(rows), a.hidden.shape[1])
        for begin, w in _tiles(a):
            part = dx[:, begin : begin + len(w)]
            d_h.addmm_(part, w)
            d_weight[begin : begin + len(w)].addmm_(part.mT, h)
        d_hidden[rows] = d_h
        if a.bias is not None:
            d_bias += dx.sum(0)
    d_bias = d_bias if a.bias is None else d_bias.to(a.bias.dtype)
    return d_hidden.to(a.hidden.dtype), d_weight.to(a.weight.dtype), d_bias


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


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


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

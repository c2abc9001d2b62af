"""Losses of models with large vocabularies."""

import torch
from torch import Tensor

from fastlm.checks import at_least_zero, below_one, each, one_of, positive
from fastlm.nn import checks, vocabulary
from fastlm.ops import linear_cross_entropy as ops
from fastlm.ops.logits import has_target, multiplies

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of hidden weightᵀ + bias, without a tensor of N × V.

    Args:
        hidden: [N, D] floats.
        weight: [V, D] floats, such as the embedding's; or a DTensor of which ranks hold rows, Shard(0) over one
            dimension of its mesh.
        labels: [N] int, 0 … V - 1, or ignore_index for a row without target, which costs no product.
        bias: [V] floats, divided as weight is, or None.
        ignore_index: the label of rows that have no target.
        label_smoothing: share of the target that all words have alike, in [0, 1).
        z_loss: times lse², is added to the loss.
        softcap: bounds logits x as softcap · tanh(x / softcap). None: no bound.
        temperature: logits are divided by it, after the softcap.
        reduction: "mean" over rows with a target (0 / 0 without one, as in PyTorch), "sum", or "none".

    Returns:
        A scalar in fp32 (fp64 for fp64 hidden), or [N] for "none", 0 where there is no target. For a mean over several
        batches or ranks, divide sums by (labels != ignore_index).sum() of all. -loss of "none" without label smoothing
        and z-loss is the log-probability of each label.

    Raises:
        ValueError: for shapes, dtypes, devices, placements or values that do not fit; on a CPU also for labels that are
            no words, which elsewhere would have to be waited for.

    "mean" and "sum" make their gradients on the way forward, which costs three products as plain logits do, and keeps
    them, as large as hidden and weight; "none" costs four. Differentiable once.

    On a GPU 16 bits are multiplied as such and logits are rounded to them, as F.linear's are; sums are fp32, and
    autocast makes hidden and weight 16 bits as it does for F.linear. So are two of bf16 on a CPU with AVX512_BF16 or
    AMX; all else is multiplied in fp32 on a CPU, where that is faster, whatever dtype weight has, and autocast changes
    nothing. A chunk of logits takes half a GiB on a GPU, or 1,024 rows. The formula and its sources:
    fastlm/ops/linear_cross_entropy.py.

    Where ranks hold parts of weight, each is given the same hidden and labels, as plain tensors or Replicate, and gets
    the same loss and hidden's whole gradient, both summed in the order of ranks; weight's stays divided.
    """
    checks.no_tracing("linear_cross_entropy")
    below_one(label_smoothing=label_smoothing)
    at_least_zero(z_loss=z_loss)
    positive(temperature=temperature, **({} if softcap is None else {"softcap": softcap}))
    one_of(REDUCTIONS, reduction=reduction)
    each({"ignore_index": ignore_index}, lambda x: isinstance(x, int), "give an integer, such as -100")
    checks.tensors(hidden=hidden, weight=weight, labels=labels)
    _check_shapes(hidden, weight, labels, bias)
    checks.devices(hidden, weight=weight, labels=labels, bias=bias)
    here = vocabulary.part(weight, bias)
    states, labels = vocabulary.whole(weight, hidden=hidden), vocabulary.whole(weight, labels=labels).long()
    _check_labels(labels, here.words, ignore_index)
    weight = here.weight
    if (dtype := _asked_by_autocast(states)) is not None and multiplies(dtype, states.device):
        states, weight = states.to(dtype), weight.to(dtype)
    cap = 0.0 if softcap is None else float(softcap)
    a = ops.Arguments(
        states, weight, here.bias, labels, ignore_index, float(label_smoothing), float(z_loss), cap, float(temperature),
        here.first, here.words, here.group,
    )  # fmt: skip
    return vocabulary.like(hidden, _reduced(a, reduction))


def _asked_by_autocast(x: Tensor) -> torch.dtype | None:
    """In what x would be multiplied by F.linear instead of its own dtype."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _reduced(a: ops.Arguments, reduction: str) -> Tensor:
    if reduction == "none":
        return ops.linear_cross_entropy(a)[0]
    learns = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (a.hidden, a.weight, a.bias)]
    made = ops.summed_linear_cross_entropy(a, *learns[:2]) if any(learns) else ops.linear_cross_entropy(a)
    total = made[0].sum()
    return total if reduction == "sum" else total / has_target(a, a.labels).sum()


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)}; give [N, D] and [V, D]")
    if labels.shape != hidden.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; give integers [{len(hidden)}]")
    if not (hidden.is_floating_point() and weight.is_floating_point() and len(weight)):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype} {list(weight.shape)}; give floats")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; give [{len(weight)}]")


def _check_labels(labels: Tensor, words: int, ignore_index: int) -> None:
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[((labels < 0) | (labels >= words)) & (labels != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"labels hold {int(wrong[0])}; give 0 to {words - 1}, or ignore_index {ignore_index} for no target"
            )

"""Losses of models with large vocabularies."""

import torch
from torch import Tensor

from fastlm.checks import at_least_zero, below_one, each, one_of, positive
from fastlm.nn import checks
from fastlm.ops import linear_cross_entropy as ops
from fastlm.ops.logits import multiplies_16_bits

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
        weight: [V, D] floats, such as the embedding's.
        labels: [N] int, 0 … V - 1, or ignore_index for a row without target, which costs no product.
        bias: [V] floats, or None.
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
        ValueError: for shapes, dtypes, devices or values that do not fit; on a CPU also for labels that are no words,
            which elsewhere would have to be waited for.

    "mean" and "sum" make their gradients on the way forward, which costs three products as plain logits do, and keeps
    them, as large as hidden and weight; "none" costs four. Differentiable once.

    Logits and sums are fp32 whatever dtype weight has. 16 bits are multiplied as such on a GPU, where autocast makes
    hidden and weight 16 bits as it does for F.linear; on a CPU, which multiplies fp32 faster, autocast changes nothing.
    The formula and its sources: fastlm/ops/linear_cross_entropy.py.
    """
    checks.no_tracing("linear_cross_entropy")
    below_one(label_smoothing=label_smoothing)
    at_least_zero(z_loss=z_loss)
    positive(temperature=temperature, **({} if softcap is None else {"softcap": softcap}))
    one_of(REDUCTIONS, reduction=reduction)
    each({"ignore_index": ignore_index}, lambda x: isinstance(x, int), "give an integer, such as -100")
    checks.tensors(hidden=hidden, weight=weight, labels=labels)
    _check_shapes(hidden, weight, labels, bias)
    _check_labels(labels, len(weight), ignore_index)
    checks.devices(hidden, weight=weight, labels=labels, bias=bias)
    device = hidden.device.type
    if multiplies_16_bits(hidden.device) and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    cap = 0.0 if softcap is None else float(softcap)
    a = ops.Arguments(
        hidden, weight, bias, labels.long(), ignore_index, float(label_smoothing), float(z_loss), cap,
        float(temperature),
    )  # fmt: skip
    if reduction == "none":
        return ops.linear_cross_entropy(a)[0]
    learns = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    made = ops.summed_linear_cross_entropy(a, *learns[:2]) if any(learns) else ops.linear_cross_entropy(a)
    total = made[0].sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


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

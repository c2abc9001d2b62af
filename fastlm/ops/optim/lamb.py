"""LAMB (You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes") over lists of
tensors.

AdamW's direction, whose step is scaled for each tensor by ‖θ‖/‖r‖. The direction is computed twice instead of stored:
the first pass updates the moments and sums θ² and r², the second moves θ; 28 bytes a parameter in fp32 where the second
pass finds its data in the cache, 40 where it does not. AdamW is LAMB with ratio 1, and they share csrc/rules/adam.h.
Backends: update.py's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.optim.adamw import AdamOptions, AdamUpdate, corrections, moments
from fastlm.ops.optim.precision import Parameter, assign, parameters
from fastlm.ops.optim.sums import UpdateRule, all_dims, run_rules
from fastlm.ops.optim.update import UpdateOp


class RatioOptions(NamedTuple):
    """The ratio that scales a tensor's step.

    adapt: False for ratio 1. rms: nanoT5's AdamWScale. norm_low, norm_high: bounds of ‖θ‖; low, high: of the ratio.
    """

    adapt: bool
    rms: bool
    norm_low: float
    norm_high: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------------------------------
# Definition


@UpdateOp
def lamb(update: AdamUpdate, options: AdamOptions, ratio: RatioOptions) -> None:
    """One update in place: g ← coefficient · g, t ← t + 1, m and v as AdamW's, then

        r = m̂ / (√v̂ + eps) + weight_decay·θ;  θ ← θ - lr · ratio · r
        ratio = clip(clip(‖θ‖, norm_low, norm_high) / ‖r‖, low, high), and 1 where a norm is 0 or adapt is False

    correction "none": m̂ = m and v̂ = v; "moments": they are corrected for bias; "step": √(1 - β₂ᵗ)/(1 - β₁ᵗ) multiplies
    the step instead (DeepSpeed). rms: θ ← (1 - lr·weight_decay)(θ - lr · ratio · m̂ / (√v̂ + eps)) and ratio =
    clip(RMS(θ), low, high), where the factor of correction "step" multiplies the step alone (AdamWScale of nanoT5). r
    is taken from the moments as they are stored.
    """
    for rule in lamb_rules([p.shape for p in update.params], update, options, ratio):
        run_rules([rule], [()])


def lamb_rules(
    shapes: list[torch.Size], update: AdamUpdate, options: AdamOptions, ratio: RatioOptions
) -> list[UpdateRule]:
    """lamb of each tensor, of which the update may have shards; `shapes` are of whole tensors."""
    states = zip(update.grads, update.exp_avgs, update.exp_avg_sqs, update.steps, strict=True)
    flags = update.coefficient, update.found_inf
    return [
        _rule(shape, p, *tensors, *flags, options, ratio)
        for shape, p, tensors in zip(shapes, parameters(update), states, strict=True)
    ]


def _rule(
    shape: torch.Size, p: Parameter, g: Tensor, m: Tensor, v: Tensor, step: Tensor,
    coefficient: Tensor | None, found_inf: Tensor | None, options: AdamOptions, ratio: RatioOptions,
) -> UpdateRule:  # fmt: skip
    rate, bias1, root = corrections(step, options)
    theta = p.read()
    m_new, v_new = moments(theta, g, m, v, coefficient, options)
    m_new, v_new = m_new.to(m.dtype), v_new.to(v.dtype)
    direction = (1 / bias1).float() * m_new.float() / (v_new.float().sqrt() / root.float() + options.eps)
    decay, step_size = 1 - rate * options.decay, rate
    if ratio.adapt and ratio.rms:
        (squares,) = yield [(theta.double().square(), all_dims(theta))]
        decay = torch.full_like(rate, 1 - options.lr * options.decay)
        step_size = decay * rate * (squares.view(()) / shape.numel()).sqrt().clamp(ratio.low, ratio.high)
    elif ratio.adapt:
        squares = yield [(x.double().square(), all_dims(x)) for x in (theta, direction + options.decay * theta)]
        norm, r = (x.view(()).sqrt() for x in squares)
        norm = norm.clamp(ratio.norm_low, ratio.norm_high)
        trust = torch.where((norm > 0) & (r > 0), (norm / r).clamp(ratio.low, ratio.high), 1.0)
        decay, step_size = 1 - rate * trust * options.decay, rate * trust
    theta = decay.float() * theta - step_size.float() * direction
    assign([*p.write(theta, step + 1), (m, m_new), (v, v_new), (step, step + 1)], found_inf)

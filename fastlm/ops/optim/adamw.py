"""AdamW (Loshchilov & Hutter 2019) and Adam (Kingma & Ba 2015) over lists of tensors, with unscaling, clipping and the
overflow skip inside.

Parameters and gradients may be fp32, bf16 or fp16, each tensor by itself, moments fp32 or bf16; the arithmetic is fp32,
the steps are fp32 scalars. One pass reads p, g, m, v and writes p, m, v: 28 bytes a parameter in fp32. The rule is
written once for CPU and GPU in csrc/rules/adam.h. Backends: update.py's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.optim.precision import assign, parameters
from fastlm.ops.optim.update import UpdateOp

CORRECTIONS = {"none": 0, "moments": 1, "step": 2}  # where bias correction goes; csrc/rules/adam.h: Correction


class AdamUpdate(NamedTuple):
    """One update of Adam's family; update.py says what the fields are that every update has."""

    params: list[Tensor]
    masters: list[Tensor]
    keys: list[int]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    coefficient: Tensor | None
    found_inf: Tensor | None


class AdamOptions(NamedTuple):
    """correction: one of CORRECTIONS. decoupled: weight_decay is AdamW's, else Adam's, an L2 penalty."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    correction: int
    decoupled: bool

    @property
    def decay(self) -> float:
        return self.weight_decay if self.decoupled else 0.0

    @property
    def l2(self) -> float:
        return 0.0 if self.decoupled else self.weight_decay


# ---------------------------------------------------------------------------------------------------------------------
# Definition


@UpdateOp
def adamw(update: AdamUpdate, options: AdamOptions) -> None:
    """One update in place: g ← coefficient · g, t ← t + 1, then

        decoupled: θ ← θ - lr·weight_decay·θ;  else g ← g + weight_decay·θ
        m ← β₁m + (1 - β₁)g;  v ← β₂v + (1 - β₂)g²
        θ ← θ - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)

    correction "none" leaves both denominators 1 (Google's BERT), and "step" multiplies lr, the decay's too, by
    √(1 - β₂ᵗ)/(1 - β₁ᵗ) instead (DeepSpeed's LAMB).
    """
    states = zip(update.grads, update.exp_avgs, update.exp_avg_sqs, update.steps, strict=True)
    for p, (g, m, v, step) in zip(parameters(update), states, strict=True):
        rate, bias1, root = corrections(step, options)
        theta = p.read()
        m_new, v_new = moments(theta, g, m, v, update.coefficient, options)
        direction = m_new / (v_new.sqrt() / root.float() + options.eps)
        theta = theta * (1 - rate * options.decay).float() - (rate / bias1).float() * direction
        assign([*p.write(theta, step + 1), (m, m_new), (v, v_new), (step, step + 1)], update.found_inf)


def corrections(step: Tensor, options: AdamOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The step's rate and the divisors of m and √v, at the update after `step`, fp64."""
    t = (step + 1).double()
    rate, one = torch.full_like(t, options.lr), torch.ones_like(t)
    if options.correction == CORRECTIONS["none"]:
        return rate, one, one
    bias1, root = 1 - options.beta1**t, (1 - options.beta2**t).sqrt()
    return (rate, bias1, root) if options.correction == CORRECTIONS["moments"] else (rate * root / bias1, one, one)


def moments(
    theta: Tensor, g: Tensor, m: Tensor, v: Tensor, coefficient: Tensor | None, options: AdamOptions
) -> tuple[Tensor, Tensor]:
    """The next m and v, fp32."""
    beta1, beta2 = options.beta1, options.beta2
    g = (g.float() if coefficient is None else coefficient * g.float()) + options.l2 * theta
    return beta1 * m.float() + (1 - beta1) * g, beta2 * v.float() + (1 - beta2) * (g * g)

"""AdamW (Loshchilov & Hutter 2019) and Adam (Kingma & Ba 2015) over lists of tensors, with unscaling, clipping and the
overflow skip inside.

Parameters and gradients may be fp32, bf16 or fp16, each tensor by itself, moments fp32 or bf16; the arithmetic is fp32,
the steps are fp32 scalars. One pass reads p, g, m, v and writes p, m, v: 28 bytes a parameter in fp32. The rule is
written once for CPU and GPU in csrc/rules/adam.h.
"""

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import op
from fastlm.backends.native import address
from fastlm.ops.lists import Lists, refuses_lists
from fastlm.ops.precision import assign, parameters

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op(mutates=("params", "companions", "exp_avgs", "exp_avg_sqs", "steps"))
def adamw(
    params: list[Tensor], companions: list[Tensor], keys: list[int],
    grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    coefficient: Tensor | None, found_inf: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, bias_correction: bool, decoupled: bool,
) -> None:  # fmt: skip
    """One update in place: g ← coefficient · g, t ← t + 1, then

        decoupled: θ ← θ - lr·weight_decay·θ;  else g ← g + weight_decay·θ
        m ← β₁m + (1 - β₁)g;  v ← β₂v + (1 - β₂)g²
        θ ← θ - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)

    bias_correction=False leaves both denominators 1 (Google's BERT). companions, keys: see precision.py. coefficient,
    found_inf: fp32 scalars on the device; found_inf ≠ 0 leaves every bit of params, companions, moments and steps as it
    was. Nothing is read back to the host.
    """
    for p, g, m, v, step in zip(parameters(params, companions, keys), grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        bias1, bias2 = biases(step, beta1, beta2, bias_correction)
        theta = p.read()
        m_new, v_new = moments(theta, g, m, v, coefficient, beta1, beta2, 0.0 if decoupled else weight_decay)
        update = m_new / (v_new.sqrt() / bias2.sqrt().float() + eps)
        theta = theta * (1 - lr * weight_decay * decoupled) - (lr / bias1).float() * update
        assign([*p.write(theta, step + 1), (m, m_new), (v, v_new), (step, step + 1)], found_inf)


def biases(step: Tensor, beta1: float, beta2: float, corrected: bool) -> tuple[Tensor, Tensor]:
    """1 - β₁ᵗ and 1 - β₂ᵗ at the update after `step`, fp64; ones if not corrected."""
    t = (step + 1).double()
    return (1 - beta1**t, 1 - beta2**t) if corrected else (torch.ones_like(t), torch.ones_like(t))


def moments(
    theta: Tensor, g: Tensor, m: Tensor, v: Tensor, coefficient: Tensor | None, beta1: float, beta2: float, l2: float
) -> tuple[Tensor, Tensor]:
    """The next m and v, fp32. l2: Adam's weight decay, which joins the gradient."""
    g = (g.float() if coefficient is None else coefficient * g.float()) + l2 * theta
    return beta1 * m.float() + (1 - beta1) * g, beta2 * v.float() + (1 - beta2) * (g * g)


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def refuses_moments(params, companions, keys, grads, exp_avgs, exp_avg_sqs, *rest):
    return refuses_lists(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)


def _launch(module, params, companions, keys, grads, exp_avgs, exp_avg_sqs, steps, coefficient, found_inf, *options):
    *scalars, bias_correction, decoupled, where = options
    lists = Lists(params, companions, keys, grads, steps, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    flags = address(coefficient), address(found_inf)
    rule = module.AdamOptions(*scalars, int(bias_correction), decoupled)
    module.adamw(*lists.arguments(module), lists.steps, lists.sizes(), *flags, rule, *where)
    lists.write_back()


@adamw.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=refuses_moments)
def _(*args):
    _launch(native.cpu(), *args, (torch.get_num_threads(),))


@adamw.backend("cuda", devices=("cuda",), unavailable=native.cuda_missing, refuses=refuses_moments)
def _(params, *args):
    workspace = native.cuda_workspace("adamw", params)
    _launch(native.cuda(), params, *args, (workspace.data_ptr(), *native.cuda_stream(params[0].device)))

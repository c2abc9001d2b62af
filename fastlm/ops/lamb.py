"""LAMB (You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes") over lists of
tensors.

AdamW's direction, whose step is scaled for each tensor by ‖θ‖/‖r‖. The direction is computed twice instead of stored:
the first pass updates the moments and sums θ² and r², the second moves θ; 28 bytes a parameter in fp32 where the second
pass finds its data in the cache, 40 where it does not. AdamW is LAMB with ratio 1, and they share csrc/rules/adam.h.
"""

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import op
from fastlm.backends.native import address
from fastlm.ops.adamw import biases, moments, refuses_moments
from fastlm.ops.lists import Lists
from fastlm.ops.precision import assign, parameters
from fastlm.ops.sums import Rule, every, follow

CORRECTIONS = {"none": 0, "moments": 1, "step": 2}  # where bias correction goes; csrc/rules/adam.h: Correction

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op(mutates=("params", "companions", "exp_avgs", "exp_avg_sqs", "steps"))
def lamb(
    params: list[Tensor], companions: list[Tensor], keys: list[int],
    grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    coefficient: Tensor | None, found_inf: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, correction: int,
    adapt: bool, rms: bool, norm_low: float, norm_high: float, low: float, high: float,
) -> None:  # fmt: skip
    """One update in place: g ← coefficient · g, t ← t + 1, m and v as AdamW's, then

        r = m̂ / (√v̂ + eps) + weight_decay·θ;  θ ← θ - lr · ratio · r
        ratio = clip(clip(‖θ‖, norm_low, norm_high) / ‖r‖, low, high), and 1 where a norm is 0 or adapt is False

    correction: 0, m̂ = m and v̂ = v; 1, they are corrected for bias; 2, √(1 - β₂ᵗ)/(1 - β₁ᵗ) multiplies the step
    instead (DeepSpeed). rms: θ ← (1 - lr·weight_decay)(θ - lr · ratio · m̂ / (√v̂ + eps)) and ratio = clip(RMS(θ), low,
    high), where the factor of correction 2 multiplies the step alone (AdamWScale of nanoT5). r is taken from the
    moments as they are stored. companions, keys, coefficient, found_inf: as for adamw.
    """
    lists, flags = (params, companions, keys, grads, exp_avgs, exp_avg_sqs, steps), (coefficient, found_inf)
    ratio = adapt, rms, norm_low, norm_high, low, high
    for rule in lamb_rules(
        [p.shape for p in params], *lists, *flags, lr, beta1, beta2, eps, weight_decay, correction, *ratio
    ):
        follow([rule], [()])


def lamb_rules(
    shapes: list[torch.Size], params, companions, keys, grads, exp_avgs, exp_avg_sqs, steps, *scalars
) -> list[Rule]:
    """The update of each tensor, of which `params` and their like may be shards; `shapes` are of whole tensors.
    scalars: as lamb's.
    """
    each = zip(shapes, parameters(params, companions, keys), grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    return [_rule(*tensors, *scalars) for tensors in each]


def _rule(
    shape, p, g, m, v, step, coefficient, found_inf, lr, beta1, beta2, eps, weight_decay, correction, adapt, rms, norm_low, norm_high, low, high
) -> Rule:  # fmt: skip
    bias1, bias2 = biases(step, beta1, beta2, correction != 0)
    theta = p.read()
    m_new, v_new = (
        x.to(old.dtype) for x, old in zip(moments(theta, g, m, v, coefficient, beta1, beta2, 0.0), (m, v), strict=True)
    )
    if correction == CORRECTIONS["step"]:
        rate, scale, root = lr * bias2.sqrt() / bias1, torch.ones_like(bias1), torch.ones_like(bias2)
    else:
        rate, scale, root = torch.full_like(bias1, lr), 1 / bias1, bias2.sqrt()
    direction = scale.float() * m_new.float() / (v_new.float().sqrt() / root.float() + eps)
    decay, step_size = 1 - rate * weight_decay, rate
    if adapt and rms:
        (squares,) = yield [(theta.double().square(), every(theta))]
        decay = torch.full_like(rate, 1 - lr * weight_decay)
        step_size = decay * rate * (squares.view(()) / shape.numel()).sqrt().clamp(low, high)
    elif adapt:
        squares = yield [(x.double().square(), every(x)) for x in (theta, direction + weight_decay * theta)]
        norm, r = (x.view(()).sqrt() for x in squares)
        norm = norm.clamp(norm_low, norm_high)
        ratio = torch.where((norm > 0) & (r > 0), (norm / r).clamp(low, high), 1.0)
        decay, step_size = 1 - rate * ratio * weight_decay, rate * ratio
    assign(
        [
            *p.write(decay.float() * theta - step_size.float() * direction, step + 1),
            (m, m_new),
            (v, v_new),
            (step, step + 1),
        ],
        found_inf,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _launch(module, params, companions, keys, grads, exp_avgs, exp_avg_sqs, steps, coefficient, found_inf, *options):
    adam, ratio, where = options[:6], options[6:-1], options[-1]
    lists = Lists(params, companions, keys, grads, steps, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    flags = address(coefficient), address(found_inf)
    rules = module.AdamOptions(*adam, True), module.RatioOptions(*ratio)
    module.lamb(*lists.arguments(module), lists.steps, lists.sizes(), *flags, *rules, *where)
    lists.write_back()


@lamb.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=refuses_moments)
def _(*args):
    _launch(native.cpu(), *args, (torch.get_num_threads(),))


@lamb.backend("cuda", devices=("cuda",), unavailable=native.cuda_missing, refuses=refuses_moments)
def _(params, *args):
    workspace = native.cuda_workspace("lamb", params)
    _launch(native.cuda(), params, *args, (workspace.data_ptr(), *native.cuda_stream(params[0].device)))

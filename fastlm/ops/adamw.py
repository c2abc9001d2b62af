"""AdamW over lists of tensors (Loshchilov & Hutter 2019), with unscaling, clipping and the overflow skip inside.

Parameters and gradients may be fp32, bf16 or fp16, each tensor by itself; moments are fp32 (or the parameter's dtype); the
arithmetic is fp32, the steps are fp32 scalars. One pass reads p, g, m, v and writes p, m, v: 28 bytes a parameter in fp32.
The rule is written once for CPU and GPU in csrc/rules/adamw.h.
"""

import torch
from torch import Tensor

from fastlm import native
from fastlm.dispatch import op
from fastlm.ops.lists import cpp_list, dense_like, refuses_lists, write_back

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op(mutates=("params", "exp_avgs", "exp_avg_sqs", "steps"))
def adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    coefficient: Tensor | None, found_inf: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, bias_correction: bool,
) -> None:  # fmt: skip
    """One update in place: g ← coefficient · g, t ← t + 1, then

        θ ← θ - lr·weight_decay·θ;  m ← m + (1 - β₁)(g - m);  v ← β₂v + (1 - β₂)g²
        θ ← θ - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)

    bias_correction=False leaves both denominators 1 (Google's BERT). coefficient, found_inf: fp32 scalars on the device;
    found_inf ≠ 0 leaves every bit of params, moments and steps as it was. Nothing is read back to the host.
    """
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        t = (step + 1).double()
        bias1, bias2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (torch.ones_like(t), torch.ones_like(t))
        g = g.float() if coefficient is None else coefficient * g.float()
        m_new = m.float() + (1 - beta1) * (g - m.float())
        v_new = beta2 * v.float() + (1 - beta2) * (g * g)
        update = m_new / (v_new.sqrt() / bias2.sqrt().float() + eps)
        p_new = p.float() * (1 - lr * weight_decay) - (lr / bias1).float() * update
        for old, new in ((p, p_new), (m, m_new), (v, v_new), (step, step + 1)):
            old.copy_(new if found_inf is None else torch.where(found_inf != 0, old.to(new.dtype), new))


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _refuses(params, grads, exp_avgs, exp_avg_sqs, steps, *rest):
    return refuses_lists(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)


def _launch(module, params, grads, exp_avgs, exp_avg_sqs, steps, coefficient, found_inf, *scalars):
    """Lay the lists out alike, hand over addresses, and bring copies back where a tensor was not dense."""
    p = [dense_like(x, x) for x in params]
    g, m, v = ([dense_like(x, like) for x, like in zip(xs, p, strict=True)] for xs in (grads, exp_avgs, exp_avg_sqs))
    sizes = [x.numel() for x in p]
    addresses = [0 if s is None else s.data_ptr() for s in (coefficient, found_inf)]
    module.adamw(*(cpp_list(xs) for xs in (p, g, m, v)), [s.data_ptr() for s in steps], sizes, *addresses, *scalars)
    for originals, dense in ((params, p), (exp_avgs, m), (exp_avg_sqs, v)):
        write_back(originals, dense)


@adamw.backend("cpp", devices=("cpu",), missing=native.cpp_missing, refuses=_refuses)
def _(*args):
    _launch(native.cpu(), *args, torch.get_num_threads())


@adamw.backend("cuda", devices=("cuda",), missing=native.cuda_missing, refuses=_refuses)
def _(params, *args):
    workspace = torch.empty(native.cuda().adamw_workspace(len(params)), dtype=torch.uint8, device=params[0].device)
    _launch(native.cuda(), params, *args, workspace.data_ptr(), *native.cuda_stream(params[0].device))

"""Adafactor (Shazeer & Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost") over lists of tensors.

A matrix of n × m keeps n + m numbers of state. The three implementations in use, mesh TensorFlow's (T5), Hugging Face's (after
fairseq) and torch's, differ in scalars of this one op. Two passes over the gradient are exact, because the RMS of the
update follows from weighted column sums of the first; csrc/rules/adafactor.h has the algebra. Bytes a parameter in fp32: 12 where
the second pass finds its data in the cache (reads g, p; writes p), 20 where it does not.
"""

import torch
from torch import Tensor

from fastlm import native
from fastlm.dispatch import op
from fastlm.ops.lists import Lists, address, refuses_lists, write_back
from fastlm.ops.precision import assign, parameters

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op(mutates=("params", "companions", "rows", "cols", "exp_avgs", "steps"))
def adafactor(
    params: list[Tensor], companions: list[Tensor], keys: list[int],
    grads: list[Tensor], rows: list[Tensor], cols: list[Tensor], exp_avgs: list[Tensor], steps: list[Tensor],
    coefficient: Tensor | None, found_inf: Tensor | None,
    lr: float, relative_step: bool, ramp: float, decay_rate: float, decay_offset: float,
    eps_square: float, eps_bound: float, eps_scale: float, scale_parameter: bool, scale: float,
    clip_threshold: float, beta1: float, weight_decay: float, decay_by_step: bool,
) -> None:  # fmt: skip
    """One update in place of params [..., n, m], rows [..., n], cols [..., m]: g ← coefficient · g, t ← t + 1, then

        β = 1 - (t - decay_offset)^-decay_rate
        R ← βR + (1 - β)(mean_j g² + eps_square);  C ← βC + (1 - β)(mean_i g² + eps_square)
        V = R Cᵀ / max(mean R, eps_bound), at least eps_bound²;  u = g / √V;  u ← u / max(1, RMS(u)/clip_threshold)
        ρ = min(lr, ramp·t, 1/√t) if relative_step else lr;  α = ρ · (max(eps_scale, RMS(θ)) if scale_parameter else scale)
        θ ← θ - weight_decay · (α if decay_by_step else lr) · θ - α·u

    Leading dimensions are batches of matrices; both RMS are over the whole tensor. A tensor whose `cols` entry is empty is not
    factored: its `rows` entry, shaped like it, holds V ← βV + (1 - β)(g² + eps_square). exp_avgs: empty for beta1 = 0, else
    m ← beta1·m + (1 - beta1)·α·u takes the place of α·u. rows, cols: fp32. companions, keys, coefficient, found_inf: as for adamw.
    """
    for i, (p, g, row, col, step) in enumerate(zip(parameters(params, companions, keys), grads, rows, cols, steps, strict=True)):
        if g.numel() == 0:
            assign([(step, step + 1)], found_inf)
            continue
        theta = p.read()
        g = g.float() if coefficient is None else coefficient * g.float()
        t = (step + 1).double()
        one_beta = (t - decay_offset).clamp(min=1.0) ** -decay_rate
        average = lambda old, x: ((1 - one_beta).float() * old + one_beta.float() * (x + eps_square)).float()  # noqa: B023
        if col.numel():
            R, C = average(row, g.square().mean(-1)), average(col, g.square().mean(-2))
            mean = R.mean(-1, keepdim=True).clamp(min=eps_bound)
            rate = (mean / R).sqrt()[..., None] * C.rsqrt()[..., None, :]
            written = [(row, R), (col, C)]
        else:
            R = average(row, g.square())
            rate, written = R.rsqrt(), [(row, R)]
        u = g * rate.clamp(max=1 / eps_bound if eps_bound else torch.inf)
        rho = torch.minimum(t.rsqrt(), (ramp * t).clamp(max=lr)) if relative_step else torch.full_like(t, lr)
        alpha = rho * (theta.double().square().mean().sqrt().clamp(min=eps_scale) if scale_parameter else scale)
        u = u * (alpha / (u.double().square().mean().sqrt() / clip_threshold).clamp(min=1.0)).float()
        if exp_avgs:
            u = beta1 * exp_avgs[i].float() + (1 - beta1) * u
            written.append((exp_avgs[i], u))
        theta = theta * (1 - weight_decay * (alpha if decay_by_step else torch.full_like(alpha, lr))).float() - u
        assign([*p.write(theta, step + 1), *written, (step, step + 1)], found_inf)


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _refuses(params, companions, keys, grads, rows, cols, exp_avgs, *rest):
    return refuses_lists(params=params, grads=grads, exp_avgs=exp_avgs)


def _launch(module, params, companions, keys, grads, rows, cols, exp_avgs, steps, coefficient, found_inf, *options):
    *scalars, where = options
    lists = Lists(params, companions, keys, grads, exp_avgs, row_major=True)
    factors = [x.contiguous() for x in rows], [x.contiguous() for x in cols]
    addresses = [[x.data_ptr() for x in xs] for xs in (*factors, steps)]
    p, g, m = lists.arguments(module)
    shapes = [_shape(p, col) for p, col in zip(params, cols, strict=True)]
    module.adafactor(p, g, *addresses[:2], m, addresses[2], shapes, address(coefficient), address(found_inf), module.AdafactorOptions(*scalars), *where)
    lists.write_back()
    write_back(rows, factors[0]), write_back(cols, factors[1])


def _shape(p: Tensor, col: Tensor) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter; columns 0 if it is not factored."""
    if p.numel() == 0 or col.numel() == 0:
        return 1, p.numel(), 0
    return p.numel() // (p.shape[-2] * p.shape[-1]), p.shape[-2], p.shape[-1]


@adafactor.backend("cpp", devices=("cpu",), missing=native.cpp_missing, refuses=_refuses)
def _(*args):
    _launch(native.cpu(), *args, (torch.get_num_threads(),))

"""Adafactor (Shazeer & Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost") over lists of
tensors.

A matrix of n × m keeps n + m numbers of state. The three implementations in use, mesh TensorFlow's (T5), Hugging Face's
(after fairseq) and torch's, differ in scalars of this one op. Two passes over the gradient are exact, because the RMS
of the update follows from weighted column sums of the first; csrc/rules/adafactor.h has the algebra. Bytes a parameter
in fp32: 12 where the second pass finds its data in the cache (reads g, p; writes p), 20 where it does not.
"""

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import op
from fastlm.backends.native import address
from fastlm.ops.lists import Lists, addresses, refuses_lists, write_back
from fastlm.ops.precision import assign, parameters
from fastlm.ops.sums import Rule, every, follow

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
        ρ = min(lr, ramp·t, 1/√t) if relative_step else lr;  α = ρ · (max(eps_scale, RMS(θ)) if scale_parameter else
        scale)
        θ ← θ - weight_decay · (α if decay_by_step else lr) · θ - α·u

    Leading dimensions are batches of matrices; both RMS are over the whole tensor. A tensor whose `cols` entry is empty
    is not factored: its `rows` entry, shaped like it, holds V ← βV + (1 - β)(g² + eps_square). exp_avgs: empty for
    beta1 = 0, else m ← beta1·m + (1 - beta1)·α·u takes the place of α·u. rows, cols: fp32. companions, keys,
    coefficient, found_inf: as for adamw.
    """
    lists, flags = (params, companions, keys, grads, rows, cols, exp_avgs, steps), (coefficient, found_inf)
    step_size = (
        lr,
        relative_step,
        ramp,
        decay_rate,
        decay_offset,
        eps_square,
        eps_bound,
        eps_scale,
        scale_parameter,
        scale,
    )
    for rule in adafactor_rules(
        [p.shape for p in params], *lists, *flags, *step_size, clip_threshold, beta1, weight_decay, decay_by_step
    ):
        follow([rule], [()])


def adafactor_rules(
    shapes: list[torch.Size], params, companions, keys, grads, rows, cols, exp_avgs, steps, *scalars
) -> list[Rule]:
    """The update of each tensor, of which `params` and their like may be shards; `shapes` are of whole tensors.
    scalars: as adafactor's.
    """
    momenta = exp_avgs or [None] * len(params)
    each = zip(shapes, parameters(params, companions, keys), grads, rows, cols, momenta, steps, strict=True)
    return [_rule(*tensors, *scalars) for tensors in each]


def _rule(
    shape, p, g, row, col, exp_avg, step, coefficient, found_inf, lr, relative_step, ramp, decay_rate, decay_offset,
    eps_square, eps_bound, eps_scale, scale_parameter, scale, clip_threshold, beta1, weight_decay, decay_by_step,
) -> Rule:  # fmt: skip
    if shape.numel() == 0:
        return assign([(step, step + 1)], found_inf)
    theta = p.read()
    g = g.float() if coefficient is None else coefficient * g.float()
    t = (step + 1).double()
    one_beta = (t - decay_offset).clamp(min=1.0) ** -decay_rate
    average = lambda old, x: ((1 - one_beta).float() * old + one_beta.float() * (x + eps_square)).float()
    if row.ndim < g.ndim:
        n, m = shape[-2:]
        row_sum, col_sum = yield [(g.square(), (-1,)), (g.square(), (-2,))]
        R, C = average(row[..., None], row_sum / m), average(col[..., None, :], col_sum / n)
        (R_sum,) = yield [(R, (-2,))]
        rate = ((R_sum / n).clamp(min=eps_bound) / R).sqrt() * C.rsqrt()
        written = [(row, R[..., 0]), (col, C[..., 0, :])]
    else:
        R = average(row, g.square())
        rate, written = R.rsqrt(), [(row, R)]
    u = g * rate.clamp(max=1 / eps_bound if eps_bound else torch.inf)
    squares = yield [(x.double().square(), every(x)) for x in (u, theta)]
    u_rms, theta_rms = ((x.view(()) / shape.numel()).sqrt() for x in squares)
    rho = torch.minimum(t.rsqrt(), (ramp * t).clamp(max=lr)) if relative_step else torch.full_like(t, lr)
    alpha = rho * (theta_rms.clamp(min=eps_scale) if scale_parameter else scale)
    u = u * (alpha / (u_rms / clip_threshold).clamp(min=1.0)).float()
    if exp_avg is not None:
        u = beta1 * exp_avg.float() + (1 - beta1) * u
        written.append((exp_avg, u))
    theta = theta * (1 - weight_decay * (alpha if decay_by_step else torch.full_like(alpha, lr))).float() - u
    assign([*p.write(theta, step + 1), *written, (step, step + 1)], found_inf)


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _refuses(params, companions, keys, grads, rows, cols, exp_avgs, *rest):
    return refuses_lists(params=params, grads=grads, exp_avgs=exp_avgs)


def _launch(module, params, companions, keys, grads, rows, cols, exp_avgs, steps, coefficient, found_inf, *options):
    *scalars, where = options
    lists = Lists(params, companions, keys, grads, steps, row_major=True, exp_avgs=exp_avgs)
    factors = [x.contiguous() for x in rows], [x.contiguous() for x in cols]
    shapes = _shapes(params, cols)
    factored = list(zip((p.shape for p in params), (columns > 0 for _, _, columns in shapes), strict=True))
    R = addresses("rows", factors[0], [shape[:-1] if f else shape for shape, f in factored], params)
    C = addresses("cols", factors[1], [shape[:-2] + shape[-1:] if f else (0,) for shape, f in factored], params)
    p, g, m = lists.arguments(module)
    flags = address(coefficient), address(found_inf)
    module.adafactor(p, g, R, C, m, lists.steps, shapes, *flags, module.AdafactorOptions(*scalars), *where)
    lists.write_back()
    write_back(rows, factors[0]), write_back(cols, factors[1])


def _shapes(params: list[Tensor], cols: list[Tensor]) -> list[tuple[int, int, int]]:
    """(matrices, rows, columns) of each parameter; columns 0 if it is not factored."""
    factored = lambda p: (p.numel() // (p.shape[-2] * p.shape[-1]), p.shape[-2], p.shape[-1])
    return [
        factored(p) if p.numel() and col.numel() else (1, p.numel(), 0) for p, col in zip(params, cols, strict=True)
    ]


@adafactor.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)
def _(*args):
    _launch(native.cpu(), *args, (torch.get_num_threads(),))


@adafactor.backend("cuda", devices=("cuda",), unavailable=native.cuda_missing, refuses=_refuses)
def _(params, companions, keys, grads, rows, cols, *args):
    workspace = native.cuda_workspace("adafactor", params, _shapes(params, cols))
    _launch(
        native.cuda(),
        params,
        companions,
        keys,
        grads,
        rows,
        cols,
        *args,
        (workspace.data_ptr(), *native.cuda_stream(params[0].device)),
    )

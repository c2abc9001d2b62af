"""Adafactor (Shazeer & Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost") over lists of
tensors.

A matrix of n × m keeps n + m numbers of state. The three implementations in use, mesh TensorFlow's (T5), Hugging Face's
(after fairseq) and torch's, differ in scalars of this one op. Two passes over the gradient are exact, because the RMS
of the update follows from weighted column sums of the first; csrc/rules/adafactor.h has the algebra. Bytes a parameter
in fp32: 12 where the second pass finds its data in the cache (reads g, p; writes p), 20 where it does not. Backends:
update.py's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.optim.precision import Parameter, assign, parameters
from fastlm.ops.optim.sums import UpdateRule, all_dims, run_rules
from fastlm.ops.optim.update import UpdateOp


class AdafactorUpdate(NamedTuple):
    """One update of params [..., n, m]; update.py says what the fields are that every update has.

    rows [..., n], cols [..., m]: fp32, the averages of g² over columns and rows; leading dimensions are batches of
    matrices. A tensor whose `cols` entry is empty is not factored: its `rows` entry is shaped like it. exp_avgs: empty
    for beta1 = 0.
    """

    params: list[Tensor]
    masters: list[Tensor]
    keys: list[int]
    grads: list[Tensor]
    rows: list[Tensor]
    cols: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    coefficient: Tensor | None
    found_inf: Tensor | None


class AdafactorOptions(NamedTuple):
    lr: float
    relative_step: bool
    ramp: float
    decay_rate: float
    decay_offset: float
    eps_square: float
    eps_bound: float
    eps_scale: float
    scale_parameter: bool
    scale: float
    clip_threshold: float
    beta1: float
    weight_decay: float
    decay_by_step: bool


class AdafactorOp(UpdateOp):
    """Its launchers ask for each parameter's matrices, and its factors lie as their dimensions do."""

    factors = ("rows", "cols")
    row_major = True

    def sizes(self, update: AdafactorUpdate) -> list[tuple[int, int, int]]:
        """(matrices, rows, columns) of each parameter; columns 0 if it is not factored."""
        return [_matrices(p, col) for p, col in zip(update.params, update.cols, strict=True)]

    def factor_shapes(self, shapes: list[torch.Size], sizes: list[tuple[int, int, int]]) -> dict[str, list]:
        each = [(shape, columns > 0) for shape, (_, _, columns) in zip(shapes, sizes, strict=True)]
        return {
            "rows": [shape[:-1] if factored else shape for shape, factored in each],
            "cols": [shape[:-2] + shape[-1:] if factored else (0,) for shape, factored in each],
        }


def _matrices(p: Tensor, col: Tensor) -> tuple[int, int, int]:
    if not (p.numel() and col.numel()):
        return 1, p.numel(), 0
    rows, columns = p.shape[-2:]
    return p.numel() // (rows * columns), rows, columns


# ---------------------------------------------------------------------------------------------------------------------
# Definition


@AdafactorOp
def adafactor(update: AdafactorUpdate, options: AdafactorOptions) -> None:
    """One update in place: g ← coefficient · g, t ← t + 1, then

        β = 1 - (t - decay_offset)^-decay_rate
        R ← βR + (1 - β)(mean_j g² + eps_square);  C ← βC + (1 - β)(mean_i g² + eps_square)
        V = R Cᵀ / max(mean R, eps_bound), at least eps_bound²;  u = g / √V;  u ← u / max(1, RMS(u)/clip_threshold)
        ρ = min(lr, ramp·t, 1/√t) if relative_step else lr
        α = ρ · (max(eps_scale, RMS(θ)) if scale_parameter else scale)
        θ ← θ - weight_decay · (α if decay_by_step else lr) · θ - α·u

    Both RMS are over the whole tensor. Of a tensor that is not factored, V ← βV + (1 - β)(g² + eps_square) is kept.
    With exp_avgs, m ← beta1·m + (1 - beta1)·α·u takes the place of α·u.
    """
    for rule in adafactor_rules([p.shape for p in update.params], update, options):
        run_rules([rule], [()])


def adafactor_rules(shapes: list[torch.Size], update: AdafactorUpdate, options: AdafactorOptions) -> list[UpdateRule]:
    """adafactor of each tensor, of which the update may have shards; `shapes` are of whole tensors."""
    momenta = update.exp_avgs or [None] * len(update.params)
    states = zip(update.grads, update.rows, update.cols, momenta, update.steps, strict=True)
    flags = update.coefficient, update.found_inf
    return [
        _rule(shape, p, *tensors, *flags, options)
        for shape, p, tensors in zip(shapes, parameters(update), states, strict=True)
    ]


def _rule(
    shape: torch.Size, p: Parameter, g: Tensor, row: Tensor, col: Tensor, exp_avg: Tensor | None, step: Tensor,
    coefficient: Tensor | None, found_inf: Tensor | None, o: AdafactorOptions,
) -> UpdateRule:  # fmt: skip
    if shape.numel() == 0:
        return assign([(step, step + 1)], found_inf)
    theta = p.read()
    g = g.float() if coefficient is None else coefficient * g.float()
    t = (step + 1).double()
    one_beta = (t - o.decay_offset).clamp(min=1.0) ** -o.decay_rate

    def average(old: Tensor, square: Tensor) -> Tensor:
        return ((1 - one_beta).float() * old + one_beta.float() * (square + o.eps_square)).float()

    if row.ndim < g.ndim:
        n, m = shape[-2:]
        row_sum, col_sum = yield [(g.square(), (-1,)), (g.square(), (-2,))]
        R, C = average(row[..., None], row_sum / m), average(col[..., None, :], col_sum / n)
        (R_sum,) = yield [(R, (-2,))]
        rate = ((R_sum / n).clamp(min=o.eps_bound) / R).sqrt() * C.rsqrt()
        written = [(row, R[..., 0]), (col, C[..., 0, :])]
    else:
        R = average(row, g.square())
        rate, written = R.rsqrt(), [(row, R)]
    u = g * rate.clamp(max=1 / o.eps_bound if o.eps_bound else torch.inf)
    squares = yield [(x.double().square(), all_dims(x)) for x in (u, theta)]
    u_rms, theta_rms = ((x.view(()) / shape.numel()).sqrt() for x in squares)
    rho = torch.minimum(t.rsqrt(), (o.ramp * t).clamp(max=o.lr)) if o.relative_step else torch.full_like(t, o.lr)
    alpha = rho * (theta_rms.clamp(min=o.eps_scale) if o.scale_parameter else o.scale)
    u = u * (alpha / (u_rms / o.clip_threshold).clamp(min=1.0)).float()
    if exp_avg is not None:
        u = o.beta1 * exp_avg.float() + (1 - o.beta1) * u
        written.append((exp_avg, u))
    decay = o.weight_decay * (alpha if o.decay_by_step else torch.full_like(alpha, o.lr))
    theta = theta * (1 - decay).float() - u
    assign([*p.write(theta, step + 1), *written, (step, step + 1)], found_inf)

"""LAMB (You et al. 2020), in the four forms that are in use."""

from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.optim.adamw import CORRECTIONS
from fastlm.ops.optim.lamb import RatioOptions, lamb, lamb_rules
from fastlm.optim import checks, sharding
from fastlm.optim.adam import adam_options, moments_update
from fastlm.optim.base import Optimizer
from fastlm.optim.states import moments_specs


class Variant(NamedTuple):
    correction: str  # where bias correction goes: "none", "moments", "step"
    adapts_undecayed: bool  # whether the ratio also scales groups with weight_decay 0
    clips: str  # what `bounds` holds: "norm" of the parameter, or "ratio"; "nothing" takes none
    bounds: tuple[float, float]


VARIANTS = {
    "paper": Variant("moments", True, "norm", (0.0, torch.inf)),
    "google": Variant("none", False, "nothing", (0.0, torch.inf)),
    "apex": Variant("moments", False, "nothing", (0.0, torch.inf)),
    "deepspeed": Variant("step", True, "ratio", (0.01, 10.0)),
}


class LAMB(Optimizer, name="lamb"):
    """LAMB (You et al. 2020): AdamW's direction, scaled for each tensor to the tensor's own size.

    r = m̂/(√v̂ + eps) + weight_decay·θ and θ ← θ - lr · ‖θ‖/‖r‖ · r; the ratio is 1 where a norm is 0. Norms are per
    tensor: fused or stacked weights share one.

    variant     bias correction        ratio                                      after
    paper       of m and v             φ(‖θ‖)/‖r‖, φ clips to `bounds` if given   You et al. 2020, algorithm 2
    google      none                   1 in groups with weight_decay 0            ALBERT's lamb_optimizer.py
    apex        of m and v             1 in groups with weight_decay 0            apex.optimizers.FusedLAMB
    deepspeed   a factor of the step   clipped to `bounds`, (0.01, 10)            DeepSpeed's FusedLamb

    apex clips the global norm to 1 unless told otherwise: give max_grad_norm=1.0 for that.

    Args:
        params: parameters or groups, as torch.optim takes them.
        lr: learning rate, a number or a CPU tensor of one element; it may change between steps. Default 1e-3.
        betas: (β₁, β₂) of the averages m and v, each in [0, 1). Default (0.9, 0.999).
        eps: added to √v̂; at least 0. Default 1e-6.
        weight_decay: of the direction r; at least 0. Default 0.01.
        variant: a row of the table. Default "paper".
        bounds: (low, high), 0 ≤ low ≤ high, other bounds for "paper" and "deepspeed". None: the variant's.
        adapt: True scales groups without weight decay too (apex's use_nvlamb), False scales no group. None: the
            variant's.
        maximize: ascend instead of descending. Default False.
        common: max_grad_norm, master, state_dtype, seed, process_group, fused: see `Optimizer`. foreach and capturable
            are accepted and change nothing.

    Raises:
        ValueError: for values out of range, an unknown variant, and bounds for a variant that has none.
        TypeError: for an argument that is not known.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: str = "paper",
        bounds: tuple[float, float] | None = None,
        adapt: bool | None = None,
        maximize: bool = False,
        **common,
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            variant=variant,
            bounds=bounds,
            adapt=adapt,
            maximize=maximize,
        )
        super().__init__(params, defaults, **common)

    def check(self, group):
        super().check(group)
        checks.at_least_zero(lr=checks.number(group["lr"]), eps=group["eps"], weight_decay=group["weight_decay"])
        checks.betas(group["betas"])
        checks.one_of(VARIANTS, variant=group["variant"])
        checks.one_of((None, True, False), adapt=group["adapt"])
        if group["bounds"] is not None:
            checks.pair(
                _are_ordered, "give (low, high) with 0 ≤ low ≤ high, or None for the variant's", bounds=group["bounds"]
            )
            if VARIANTS[group["variant"]].clips == "nothing":
                has_none = f"bounds are {group['bounds']} and variant {group['variant']!r} has none"
                raise ValueError(f'{has_none}; "paper" and "deepspeed" have')

    def fixed(self, group):
        variant = VARIANTS[group["variant"]]
        low, high = group["bounds"] or variant.bounds
        return super().fixed(group) | dict(
            bias_correction=variant.correction != "none",
            adam_w_mode=True,
            grad_averaging=True,
            eps_inside_sqrt=False,
            use_nvlamb=variant.adapts_undecayed if group["adapt"] is None else group["adapt"],
            min_coeff=low,
            max_coeff=high,
        )

    def state_specs(self, p, group):
        return moments_specs(p, group)

    def update(self, group, part, coefficient, found_inf):
        variant = VARIANTS[group["variant"]]
        bounds, free = tuple(group["bounds"] or variant.bounds), (0.0, torch.inf)
        adapt = group["adapt"] if group["adapt"] is not None else variant.adapts_undecayed or group["weight_decay"] != 0
        update = moments_update(part, coefficient, found_inf)
        options = adam_options(group, CORRECTIONS[variant.correction], decoupled=True)
        ratio = RatioOptions(adapt, False, *(bounds + free if variant.clips == "norm" else free + bounds))
        if any(part.shards):
            sharding.apply(lamb, lamb_rules(part.shapes, update, options, ratio), part.shapes, part.shards)
        else:
            lamb(*update, *options, *ratio)


def _are_ordered(low: float, high: float) -> bool:
    return checks.finite(low) and isinstance(high, Real) and 0 <= low <= high

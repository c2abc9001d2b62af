"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), as torch.optim has them, and two variants that language
models use.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from fastlm.ops.optim.adamw import CORRECTIONS, AdamOptions, AdamUpdate, adamw
from fastlm.ops.optim.lamb import RatioOptions, lamb, lamb_rules
from fastlm.optim import checks, sharding
from fastlm.optim.base import Optimizer, Part
from fastlm.optim.states import moments_specs

VARIANTS = {"torch": True, "bert": False}  # whether moments are corrected for bias
RMS_FLOOR = 1e-3
BY_RMS = RatioOptions(adapt=True, rms=True, norm_low=0.0, norm_high=torch.inf, low=RMS_FLOOR, high=torch.inf)
EPS = {False: 1e-8, True: 1e-6}  # torch's, and nanoT5's where RMS(θ) scales the step


class Adam(Optimizer, name="adam"):
    """Adam (Kingma & Ba 2015, algorithm 1), as torch.optim.Adam, whose state dict it reads and writes.

    Args:
        params: parameters or groups, as torch.optim takes them.
        lr: learning rate, a number or a CPU tensor of one element; it may change between steps. Default 1e-3.
        betas: (β₁, β₂), decay of the averages of gradients and of their squares, each in [0, 1). Default (0.9, 0.999).
        eps: added to √v̂; at least 0. Default 1e-8.
        weight_decay: an L2 penalty, added to the gradient; at least 0. Default 0.
        amsgrad: not served; False.
        maximize: ascend instead of descending. Default False.
        decoupled_weight_decay: True makes it AdamW: the decay leaves the gradient alone. Default False.
        common: max_grad_norm, master, state_dtype, seed, process_group, fused: see `Optimizer`. foreach and capturable
            are accepted and change nothing: every step is one fused pass.

    Raises:
        ValueError: for values out of range, and for amsgrad or differentiable, which are not served.
        TypeError: for an argument that is not known.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()  # of a group, besides these

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **common,
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults | {name: common.pop(name) for name in self.OPTIONS}, **common)

    def check(self, group):
        super().check(group)
        checks.at_least_zero(lr=checks.number(group["lr"]), eps=group["eps"], weight_decay=group["weight_decay"])
        checks.betas(group["betas"])
        checks.flag(decoupled_weight_decay=group["decoupled_weight_decay"])

    def fixed(self, group):
        corrected, decoupled = dict(bias_correction=True, correct_bias=True), group["decoupled_weight_decay"]
        return super().fixed(group) | corrected | dict(variant="torch", scale_by_rms=False, adam_w_mode=decoupled)

    def state_specs(self, p, group):
        return moments_specs(p, group)

    def update(self, group, part, coefficient, found_inf):
        options = adam_options(group, CORRECTIONS["moments"], group["decoupled_weight_decay"])
        adamw(*moments_update(part, coefficient, found_inf), *options)


def moments_update(part: Part, coefficient: Tensor | None, found_inf: Tensor | None) -> AdamUpdate:
    """What the ops of Adam's family take of a part."""
    params = part.params, part.masters, part.keys, part.grads
    states = part.states["exp_avg"], part.states["exp_avg_sq"]
    return AdamUpdate(*params, *states, part.steps, coefficient, found_inf)


def adam_options(group: dict, correction: int, decoupled: bool) -> AdamOptions:
    numbers = map(float, (*group["betas"], group["eps"], group["weight_decay"]))
    return AdamOptions(checks.number(group["lr"]), *numbers, correction, decoupled)


class AdamW(Adam, name="adamw"):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), as torch.optim.AdamW, whose state dict it reads and writes.

    Args:
        params: parameters or groups, as torch.optim takes them.
        lr: as Adam's. Default 1e-3.
        betas: as Adam's. Default (0.9, 0.999).
        eps: added to √v̂; at least 0. None: 1e-8, or 1e-6 with scale_by_rms.
        weight_decay: each step multiplies parameters by 1 - lr · weight_decay; at least 0. Default 0.01, as torch's;
            apex's FusedAdam has 0, so give it in that one's place.
        amsgrad: not served; False.
        variant: "torch", or "bert" without bias correction (Google's BERT and ELECTRA, which use eps=1e-6).
        scale_by_rms: AdamWScale of nanoT5, with which T5 learns. The step, but not the decay, is multiplied by
            max(1e-3, RMS(θ)) of each tensor; eps is added before the moments are corrected for bias; the decay comes
            after the step. It costs a second pass over p, m and v. Default False.
        options: the rest of Adam's: maximize and the common ones.

    Raises:
        ValueError: as Adam, and for an unknown variant.
        TypeError: for an argument that is not known.
    """

    OPTIONS = ("variant", "scale_by_rms")

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        variant: str = "torch",
        scale_by_rms: bool = False,
        **options,
    ):
        eps = EPS[bool(scale_by_rms)] if eps is None else eps
        options = dict(decoupled_weight_decay=True) | options | dict(variant=variant, scale_by_rms=scale_by_rms)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

    def check(self, group):
        super().check(group)
        checks.one_of(VARIANTS, variant=group["variant"])
        checks.flag(scale_by_rms=group["scale_by_rms"])

    def fixed(self, group):
        corrected = VARIANTS[group["variant"]]
        ours = dict(bias_correction=corrected, correct_bias=corrected, decoupled_weight_decay=True)
        theirs = super().fixed(group) | ours
        return {name: value for name, value in theirs.items() if name not in self.OPTIONS}

    def translate(self, state_dict):
        """Adam's weight decay is no other where it is 0."""
        groups = [
            {**group, "decoupled_weight_decay": True} if group.get("weight_decay") == 0 else group
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups}

    def update(self, group, part, coefficient, found_inf):
        update, corrected = moments_update(part, coefficient, found_inf), VARIANTS[group["variant"]]
        if not group["scale_by_rms"]:
            adamw(*update, *adam_options(group, CORRECTIONS["moments" if corrected else "none"], decoupled=True))
            return
        options = adam_options(group, CORRECTIONS["step" if corrected else "none"], decoupled=True)
        if any(part.shards):
            sharding.apply(lamb, lamb_rules(part.shapes, update, options, BY_RMS), part.shapes, part.shards)
        else:
            lamb(*update, *options, *BY_RMS)

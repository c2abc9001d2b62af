"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), as torch.optim has them, and two variants that language
models use."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from fastlm.ops.adamw import adamw
from fastlm.ops.lamb import CORRECTIONS, lamb, lamb_rules
from fastlm.optim import checks, sharding
from fastlm.optim.base import Optimizer
from fastlm.optim.states import moments_layout

VARIANTS = {"torch": True, "bert": False}  # whether moments are corrected for bias
RMS_FLOOR = 1e-3
EPS = {False: 1e-8, True: 1e-6}  # torch's, and nanoT5's where RMS(θ) scales the step


class Adam(Optimizer, name="adam"):
    """Adam, as torch.optim.Adam, whose state dict it reads and writes: weight_decay is an L2 penalty, part of the
    gradient.

    lr may change between steps. decoupled_weight_decay=True is AdamW. foreach and capturable are accepted and change
    nothing: every step is one fused pass. common: max_grad_norm, master, state_dtype, seed, fused of every fastlm
    optimizer (`Optimizer`). Raises ValueError for values out of range and for amsgrad or differentiable, which are not
    served."""

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

    def layout(self, p, group):
        return moments_layout(p, group)

    def update(self, group, part, coefficient, found_inf):
        decoupled = group["decoupled_weight_decay"]
        adamw(*self._lists(part, coefficient, found_inf), *self._scalars(group), True, decoupled)

    def _lists(self, part, coefficient, found_inf):
        return *part[:4], part.states["exp_avg"], part.states["exp_avg_sq"], part.steps, coefficient, found_inf

    def _scalars(self, group):
        return checks.number(group["lr"]), *map(float, (*group["betas"], group["eps"], group["weight_decay"]))


class AdamW(Adam, name="adamw"):
    """AdamW, as torch.optim.AdamW, whose state dict it reads and writes.

    variant: "torch", or "bert" without bias correction (Google's BERT and ELECTRA; they use eps=1e-6). scale_by_rms:
    AdamWScale of nanoT5, which lets T5 learn: the step, but not the decay, is multiplied by max(1e-3, RMS(θ)) of each
    tensor, eps is added before the moments are corrected for bias, and the decay, lr · weight_decay, comes after the
    step; it takes a second pass over p, m and v. eps: None for 1e-8, or 1e-6 with scale_by_rms. The rest is Adam's."""

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
        lists, scalars, corrected = (
            self._lists(part, coefficient, found_inf),
            self._scalars(group),
            VARIANTS[group["variant"]],
        )
        if group["scale_by_rms"]:
            args = (
                *lists,
                *scalars,
                CORRECTIONS["step" if corrected else "none"],
                True,
                True,
                0.0,
                torch.inf,
                RMS_FLOOR,
                torch.inf,
            )
            sharding.apply(lamb, lamb_rules, part.shapes, part.shards, *args)
        else:
            adamw(*lists, *scalars, corrected, True)

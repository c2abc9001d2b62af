"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), as torch.optim has them, and two variants that language
models use."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from fastlm.ops.adamw import CORRECTIONS, AdamOptions, adamw
from fastlm.ops.lamb import RatioOptions, lamb, lamb_rules
from fastlm.optim import checks, sharding
from fastlm.optim.base import Optimizer, moments_layout, moments_update

VARIANTS = {"torch": True, "bert": False}  # whether moments are corrected for bias
RMS_FLOOR = 1e-3
BY_RMS = RatioOptions(adapt=True, rms=True, norm_low=0.0, norm_high=torch.inf, low=RMS_FLOOR, high=torch.inf)
EPS = {False: 1e-8, True: 1e-6}  # torch's, and nanoT5's where RMS(θ) scales the step


class Adam(Optimizer, name="adam"):
    """Adam, as torch.optim.Adam, whose state dict it reads and writes: weight_decay is an L2 penalty, part of the
    gradient.

    lr may change between steps. foreach, fused and capturable are accepted and change nothing: every step is one fused
    pass. common: max_grad_norm, master, state_dtype, seed of every fastlm optimizer (`Optimizer`). Raises ValueError
    for values out of range and for amsgrad or differentiable, which are not served."""

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
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **common,
    ):
        if differentiable:
            raise ValueError(f"fastlm.optim does not serve differentiable; torch.optim.{type(self).__name__} does")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(params, defaults | {name: common.pop(name) for name in self.OPTIONS}, **common)

    def check(self, group):
        super().check(group)
        checks.at_least_zero(lr=checks.number(group["lr"]), eps=group["eps"], weight_decay=group["weight_decay"])
        checks.betas(group["betas"])
        checks.flag(amsgrad=group["amsgrad"])
        if group["amsgrad"]:
            raise ValueError(f"fastlm.optim does not serve amsgrad; torch.optim.{type(self).__name__} does")

    def layout(self, p, group):
        return moments_layout(p, group)

    def update(self, group, part, coefficient, found_inf):
        options = adam_options(group, CORRECTIONS["moments"], decoupled=False)
        adamw(*moments_update(part, coefficient, found_inf), *options)


def adam_options(group: dict, correction: int, decoupled: bool) -> AdamOptions:
    lr, betas = checks.number(group["lr"]), group["betas"]
    return AdamOptions(lr, *betas, group["eps"], group["weight_decay"], correction, decoupled)


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
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, variant=variant, scale_by_rms=scale_by_rms, **options
        )

    def check(self, group):
        super().check(group)
        checks.one_of(VARIANTS, variant=group["variant"])
        checks.flag(scale_by_rms=group["scale_by_rms"])

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

"""Adafactor (Shazeer & Stern 2018), as T5, Hugging Face and torch have it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastlm.ops.optim.adafactor import AdafactorOptions, AdafactorUpdate, adafactor, adafactor_rules
from fastlm.optim import checks, sharding
from fastlm.optim.adafactor_variants import (
    CLASSES,
    VARIANTS,
    factor_last,
    factored_dims,
    moved_last,
    moved_order,
    named,
    variant_of,
    variant_of_group,
)
from fastlm.optim.base import Optimizer, Part
from fastlm.optim.states import STATE_DTYPES, StateSpec

RELATIVE_BOUND = 1e-2  # of the step that depends on time alone
T5_UNSCALED = 0.05  # mesh TensorFlow's factor where parameters do not scale the step
WARMUP_RAMP = 1e-6


class Adafactor(Optimizer, name="adafactor"):
    """Adafactor (Shazeer & Stern 2018): n + m numbers of state for an n × m matrix; a step is ρ · max(eps[1], RMS(θ)).

    State dicts go both ways between a variant and its class. A table of the variants is in adafactor_variants.py.

    Args:
        params: parameters or groups, as torch.optim takes them.
        lr: ρ. None, which "torch" lacks: the relative step, ρ = min(0.01, 1/√t) at step t. It does not read its group's
            lr, and schedules that multiply None fail: give transformers.AdafactorSchedule, which reports the steps, or
            a number. In "torch" ρ = min(lr, 1/√t), lr 0.01 by default.
        eps: (ε₁, ε₂). ε₁ is added to g² (1e-30), or in "torch" bounds √V from below (None: the dtype's eps); ε₂ bounds
            RMS(θ) from below (1e-3).
        clip_threshold: of the update's RMS. Default 1.
        decay_rate: exponent of t in the decay of averages, at most 0. Default -0.8.
        beta1: momentum of the scaled update, which costs a state of the parameter's size. None: none.
        weight_decay: "huggingface" multiplies it by the parameter's step, "torch" by lr, "t5" has none. Default 0.
        scale_parameter: False for a step of ρ alone, or 0.05 ρ in "t5" with lr=None. Default True.
        relative_step: huggingface's; True says lr=None, and False that lr is a number.
        warmup_init: ρ = min(1e-6·t, 1/√t) instead of the relative step's. Default False.
        variant: "t5", "huggingface" or "torch". None: that of transformers.Adafactor or torch.optim.Adafactor,
            whichever has the arguments given; if both have, "huggingface", and a UserWarning says so.
        min_dim_size_to_factor: least factored size: the two largest in "t5" (128), else the last two (0).
        decay_offset: steps after which the decay of averages starts anew, for fine-tuning. Default 0.
        beta2_decay, d: torch's names of decay_rate and clip_threshold, and their names in groups of variant "torch".
        maximize: ascend instead of descending. Default False.
        common: max_grad_norm, master, state_dtype, seed, process_group, fused of `Optimizer`; foreach does nothing.

    Raises:
        ValueError: for what a variant lacks, naming what it has, and for state dicts of a class with another variant.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor | None = None,
        eps: tuple[float | None, float] | None = None,
        clip_threshold: float | None = None,
        decay_rate: float | None = None,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool | None = None,
        *,
        variant: str | None = None,
        min_dim_size_to_factor: int | None = None,
        decay_offset: int = 0,
        beta2_decay: float | None = None,
        d: float | None = None,
        maximize: bool = False,
        **common,
    ):
        arguments = dict(
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta1=beta1,
            scale_parameter=scale_parameter,
            relative_step=relative_step,
            warmup_init=warmup_init,
            d=d,
            beta2_decay=beta2_decay,
            maximize=maximize or None,
            foreach=common.get("foreach"),
        )
        for one, other in (("d", "clip_threshold"), ("beta2_decay", "decay_rate")):
            if None not in (arguments[one], arguments[other]) and arguments[one] != arguments[other]:
                raise ValueError(
                    f"{one}={arguments[one]} and {other}={arguments[other]} are one option; give one of them"
                )
        variant = variant_of(arguments) if variant is None else variant
        checks.one_of(VARIANTS, variant=variant)
        if relative_step is not None and variant == "torch":
            raise ValueError(
                f'relative_step is {relative_step} and variant "torch" has none: its lr bounds 1/√t; leave it out'
            )
        if relative_step is not None and relative_step != (lr is None):
            raise ValueError(
                f"relative_step={relative_step} and lr={lr} do not go together: "
                "lr=None is the relative step, a number is the step"
            )
        own = VARIANTS[variant].defaults
        defaults = dict(
            lr=_first(lr, own["lr"]),
            eps=_first(eps, own["eps"]),
            clip_threshold=_first(d, clip_threshold, 1.0),
            decay_rate=_first(beta2_decay, decay_rate, -0.8),
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=_first(scale_parameter, True),
            warmup_init=_first(warmup_init, False),
            variant=variant,
            min_dim_size_to_factor=_first(min_dim_size_to_factor, own["min_dim_size_to_factor"]),
            decay_offset=decay_offset,
            maximize=maximize,
            relative_step=None,
        )
        super().__init__(params, named(defaults, variant), **common)

    def add_param_group(self, param_group):
        variant = param_group.get("variant", self.defaults["variant"])
        lr, relative = param_group.get("lr"), param_group.get("relative_step")
        if self.defaults["lr"] is None and lr is not None and relative is None:
            raise ValueError(
                f"lr is {lr!r} in a group, and None of the optimizer, which is the relative step, and Hugging Face's "
                "would not read the group's; give the optimizer an lr, or the group relative_step=False"
            )
        super().add_param_group(named(self.defaults, variant) | named(param_group, variant))
        group = self.param_groups[-1]
        group["relative_step"] = _is_relative(group)  # from now on: schedules write numbers into a group's lr

    def check(self, group):
        super().check(group)
        variant, lr, relative = group["variant"], group["lr"], _is_relative(group)
        checks.one_of(VARIANTS, variant=variant)
        names = VARIANTS[variant].names
        cure = "give two of at least 0: of the squares, and of RMS(θ) (by name: torch's arguments have another order)"
        checks.pair(_are_eps, cure, eps=group["eps"])
        if group["eps"][0] is None and variant != "torch":
            raise ValueError(
                f'eps are {group["eps"]!r}; None is the dtype\'s own in variant "torch" alone: give a number, as 1e-30'
            )
        if lr is not None:
            checks.at_least_zero(lr=checks.number(lr))
        checks.at_least_zero(weight_decay=group["weight_decay"])
        checks.bound(**{names.clip: group[names.clip]})
        checks.whole(0, min_dim_size_to_factor=group["min_dim_size_to_factor"], decay_offset=group["decay_offset"])
        checks.flag(scale_parameter=group["scale_parameter"], warmup_init=group["warmup_init"], relative_step=relative)
        if not (checks.finite(group[names.decay]) and group[names.decay] <= 0):
            raise ValueError(f"{names.decay} is {group[names.decay]!r}; give the exponent of t, at most 0, as -0.8")
        if group["beta1"] is not None:
            checks.below_one(beta1=group["beta1"])
        if not relative and lr is None:
            raise ValueError(f"lr is None and relative_step is False in variant {variant!r}; give an lr")
        if group["warmup_init"] and not relative:
            raise ValueError(
                'warmup_init is a form of the relative step: it takes lr=None and variant "t5" or "huggingface"'
            )
        if variant == "torch" and (group["beta1"] or not group["scale_parameter"] or relative):
            raise ValueError(
                'variant "torch" has no momentum, always scales by the parameter and needs an lr; '
                "the other variants have the choice"
            )
        if variant == "t5" and group["weight_decay"]:
            raise ValueError(
                'variant "t5" has no weight decay; "huggingface" decays by the parameter\'s step, "torch" by lr'
            )

    def state_specs(self, p, group):
        variant, dims = VARIANTS[group["variant"]], factored_dims(p.shape, group)
        if dims is None:
            specs = {variant.names.whole: StateSpec(p.shape, torch.float32)}
        else:
            n, m = dims
            size_lost = (1,) if variant.keeps_dims else ()
            rows, cols = (torch.Size((*p.shape[:lost], *size_lost, *p.shape[lost + 1 :])) for lost in (m, n))
            specs = {
                variant.names.row: StateSpec(rows, torch.float32, m),
                variant.names.col: StateSpec(cols, torch.float32, n),
            }
        momentum = {"exp_avg": StateSpec(p.shape, STATE_DTYPES[group["state_dtype"]])}
        return specs if group["beta1"] is None else specs | momentum

    def translate(self, state_dict):
        """Raises ValueError for a namesake that computes otherwise than the group that is here."""
        # their number is checked later
        for saved, here in zip(state_dict["param_groups"], self.param_groups, strict=False):
            variant = variant_of_group(saved)
            if "variant" not in saved and here["variant"] != variant:
                raise ValueError(
                    f"the state is that of {CLASSES[variant]}, and this is variant {here['variant']!r}; "
                    f"build it with variant={variant!r}"
                )
        groups = [
            {"relative_step": group["lr"] is None, **group} if "lr" in group else group
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups}

    def update(self, group, part, coefficient, found_inf):
        for dtype, (shapes, shards, *lists) in self._by_eps(group, part):
            update = AdafactorUpdate(*lists, coefficient, found_inf)
            options = self._options(group, torch.finfo(dtype).eps if group["eps"][0] is None else group["eps"][0])
            if any(shards):
                sharding.apply(adafactor, adafactor_rules(shapes, update, options), shapes, shards)
            else:
                adafactor(*update, *options)

    def _by_eps(self, group: dict, part: Part):
        """Shapes, shards and the op's lists, by the parameters' dtype where eps depends on it; factored dims last."""
        dims = [factored_dims(shape, group) for shape in part.shapes]
        names, keeps_dims = VARIANTS[group["variant"]].names, VARIANTS[group["variant"]].keeps_dims
        if names.whole in part.states:
            row, col = part.states[names.whole], [p.new_empty(0, dtype=torch.float32) for p in part.params]
        else:
            row = [factor_last(x, n, m, keeps_dims) for x, (n, m) in zip(part.states[names.row], dims, strict=True)]
            col = [factor_last(x, m, n, keeps_dims) for x, (n, m) in zip(part.states[names.col], dims, strict=True)]
        masters = moved_last(part.masters, dims) if part.masters else []
        exp_avgs = moved_last(part.states["exp_avg"], dims) if "exp_avg" in part.states else []
        orders = [moved_order(len(shape), d) for shape, d in zip(part.shapes, dims, strict=True)]
        shapes = [torch.Size(shape[dim] for dim in order) for shape, order in zip(part.shapes, orders, strict=True)]
        shards = [
            tuple((order.index(dim), ranks) for dim, ranks in each)
            for each, order in zip(part.shards, orders, strict=True)
        ]
        lists = (
            shapes,
            shards,
            moved_last(part.params, dims),
            masters,
            part.keys,
            moved_last(part.grads, dims),
            row,
            col,
            exp_avgs,
            part.steps,
        )
        # every rank in one order
        dtypes = list(dict.fromkeys(p.dtype for p in part.params)) if group["eps"][0] is None else [torch.float32]
        if len(dtypes) == 1:
            return [(dtypes[0], lists)]
        chosen = {dtype: [i for i, p in enumerate(part.params) if p.dtype == dtype] for dtype in dtypes}
        return [(dtype, [[xs[i] for i in members] if xs else [] for xs in lists]) for dtype, members in chosen.items()]

    def _options(self, group: dict, eps: float) -> AdafactorOptions:
        variant, names = VARIANTS[group["variant"]], VARIANTS[group["variant"]].names
        bound, relative, ramp = self._step_size(group)
        return AdafactorOptions(
            lr=bound,
            relative_step=relative,
            ramp=ramp,
            decay_rate=-float(group[names.decay]),
            decay_offset=float(group["decay_offset"]),
            eps_square=float(eps) if variant.adds_eps else 0.0,
            eps_bound=0.0 if variant.adds_eps else float(eps),
            eps_scale=float(group["eps"][1]),
            scale_parameter=group["scale_parameter"],
            scale=T5_UNSCALED if group["variant"] == "t5" and group["relative_step"] else 1.0,
            clip_threshold=float(group[names.clip]),
            beta1=float(group["beta1"] or 0.0),
            weight_decay=float(group["weight_decay"]),
            decay_by_step=variant.decays == "by step",
        )

    def _step_size(self, group: dict) -> tuple[float, bool, float]:
        """(bound, whether time bounds it too, ramp of its warm-up)."""
        if not group["relative_step"]:
            return checks.number(group["lr"]), group["variant"] == "torch", torch.inf
        # 1/√t is at most 1
        return (1.0, True, WARMUP_RAMP) if group["warmup_init"] else (RELATIVE_BOUND, True, torch.inf)

    def _get_lr(self, group: dict, state: dict) -> float:
        """The step of the parameter with this state now, for transformers.AdafactorSchedule. Reads the device."""
        bound, relative, ramp = self._step_size(group)
        t = max(1.0, float(state.get("step", 1.0)))
        rho = min(bound, ramp * t, t**-0.5) if relative else bound
        if not group["scale_parameter"]:
            return rho * (T5_UNSCALED if group["variant"] == "t5" and group["relative_step"] else 1.0)
        square = next(p for p in group["params"] if self.state.get(p) is state).detach().float().square().mean()
        return rho * max(group["eps"][1], float(square.full_tensor() if sharding.is_dtensor(square) else square) ** 0.5)


def _first(*values: object) -> object:
    return next((value for value in values if value is not None), None)


def _are_eps(first: float | None, second: float) -> bool:
    return (first is None or (checks.finite(first) and first >= 0)) and checks.finite(second) and second >= 0


def _is_relative(group: dict) -> bool:
    """Whether the step depends on time alone: what the group says, or lr=None."""
    return group["lr"] is None if group["relative_step"] is None else group["relative_step"]

"""Adafactor (Shazeer & Stern 2018), as T5, Hugging Face and torch have it."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.adafactor import adafactor, adafactor_rules
from fastlm.optim import checks, sharding
from fastlm.optim.base import STATE_DTYPES, Kept, Optimizer, Part

RELATIVE_BOUND = 1e-2  # of the step that depends on time alone
T5_UNSCALED = 0.05  # mesh TensorFlow's factor where parameters do not scale the step
WARMUP_RAMP = 1e-6


class Variant(NamedTuple):
    defaults: dict
    adds_eps: bool  # eps[0] is added to g², else it bounds the estimate from below
    decays: str  # "by step", "by lr", or "not"


VARIANTS = {
    "t5": Variant(dict(lr=None, eps=(1e-30, 1e-3), min_dim_size_to_factor=128), True, "not"),
    "huggingface": Variant(dict(lr=None, eps=(1e-30, 1e-3), min_dim_size_to_factor=0), True, "by step"),
    "torch": Variant(dict(lr=1e-2, eps=(None, 1e-3), min_dim_size_to_factor=0), False, "by lr"),
}
CLASSES = {"torch": "torch.optim.Adafactor", "huggingface": "transformers.Adafactor"}
NAMES = {"torch": {"row_var": "exp_avg_sq_row", "col_var": "exp_avg_sq_col", "variance": "exp_avg_sq"}}


class Adafactor(Optimizer, name="adafactor"):
    """Adafactor: n + m numbers of state for an n × m matrix, steps relative to the parameter's own size.

    variant         factors                            lr                                                        eps[0] (default)
    "t5"            the two largest dimensions, both   None: ρ = min(0.01, 1/√t), times 0.05 if scale_parameter  added to g² (1e-30)
                    ≥ min_dim_size_to_factor (128)     is False; or a number
    "huggingface"   the last two                       None: ρ = min(0.01, 1/√t); or a number                    added to g² (1e-30)
    "torch"         the last two                       a number (0.01): ρ = min(lr, 1/√t)                        bounds √V (the dtype's)

    The step is ρ · max(eps[1], RMS(θ)), or ρ with scale_parameter=False. warmup_init: ρ = min(1e-6·t, 1/√t). beta1:
    momentum of the scaled update, which costs a state of the parameter's size. clip_threshold: of the update's RMS.
    decay_offset: steps after which the decay of averages starts anew, for fine-tuning. weight_decay: "huggingface"
    multiplies it by the parameter's step, "torch" by lr, "t5" has none. huggingface's relative_step=True says lr=None;
    torch's `d` and `beta2_decay` are clip_threshold and decay_rate, and are accepted. A step that is relative takes no
    notice of what is written into its group's lr, and schedules that multiply lr=None fail: give
    transformers.AdafactorSchedule, which reports the steps, or a number to schedule. foreach is accepted and changes
    nothing. common: max_grad_norm, master, state_dtype, seed of every fastlm optimizer (`Optimizer`). Raises ValueError
    for what a variant does not have, naming what it has, and for the state dict of a class whose variant this is not.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor | None = None,
        eps: tuple[float | None, float] | None = None,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        *,
        variant: str = "huggingface",
        min_dim_size_to_factor: int | None = None,
        decay_offset: int = 0,
        beta2_decay: float | None = None,
        d: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **common,
    ):
        checks.one_of(VARIANTS, variant=variant)
        if d is not None and clip_threshold not in (1.0, d):
            raise ValueError(f"d={d} and clip_threshold={clip_threshold} are one option; give one of them")
        if beta2_decay is not None and decay_rate not in (-0.8, beta2_decay):
            raise ValueError(f"beta2_decay={beta2_decay} and decay_rate={decay_rate} are one option; give one of them")
        theirs = VARIANTS[variant].defaults
        given = dict(lr=lr, eps=eps, min_dim_size_to_factor=min_dim_size_to_factor)
        defaults = {name: theirs[name] if value is None else value for name, value in given.items()} | dict(
            clip_threshold=clip_threshold if d is None else d,
            decay_rate=decay_rate if beta2_decay is None else beta2_decay,
            beta1=beta1, weight_decay=weight_decay, scale_parameter=scale_parameter, warmup_init=warmup_init, variant=variant,
            decay_offset=decay_offset, maximize=maximize, relative_step=None,
        )  # fmt: skip
        if relative_step is not None and variant == "torch":
            raise ValueError(
                f'relative_step is {relative_step} and variant "torch" has none: its lr bounds 1/√t; leave it out'
            )
        if relative_step is not None and relative_step != (lr is None):
            raise ValueError(
                f"relative_step={relative_step} and lr={lr} do not go together: lr=None is the relative step, a number is the step"
            )
        super().__init__(params, defaults, **common)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["relative_step"] = _is_relative(group)  # from now on: schedules write numbers into a group's lr

    def check(self, group):
        super().check(group)
        variant, lr, relative = group["variant"], group["lr"], _is_relative(group)
        checks.one_of(VARIANTS, variant=variant)
        bounds = lambda first, second: (
            (first is None or (checks.finite(first) and first >= 0)) and checks.finite(second) and second >= 0
        )
        checks.pair(bounds, "give two of at least 0: of the squares, and of RMS(θ)", eps=group["eps"])
        if group["eps"][0] is None and variant != "torch":
            raise ValueError(
                f'eps are {group["eps"]!r}; None is the dtype\'s own in variant "torch" alone: give a number, as 1e-30'
            )
        if lr is not None:
            checks.at_least_zero(lr=checks.number(lr))
        checks.at_least_zero(weight_decay=group["weight_decay"])
        checks.bound(clip_threshold=group["clip_threshold"])
        checks.whole(0, min_dim_size_to_factor=group["min_dim_size_to_factor"], decay_offset=group["decay_offset"])
        checks.flag(scale_parameter=group["scale_parameter"], warmup_init=group["warmup_init"], relative_step=relative)
        if not (checks.finite(group["decay_rate"]) and group["decay_rate"] <= 0):
            raise ValueError(f"decay_rate is {group['decay_rate']!r}; it is the exponent of t and at most 0, as -0.8")
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
                'variant "torch" has no momentum, always scales by the parameter and needs an lr; the other variants have the choice'
            )
        if variant == "t5" and group["weight_decay"]:
            raise ValueError(
                'variant "t5" has no weight decay; "huggingface" decays by the parameter\'s step, "torch" by lr'
            )

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def layout(self, p, group):
        dims = factored_dims(p.shape, group)
        if dims is None:
            layout = {"exp_avg_sq": Kept(p.shape, torch.float32)}
        else:
            n, m = dims
            without = lambda dim: torch.Size(size for i, size in enumerate(p.shape) if i != dim)
            layout = {
                "exp_avg_sq_row": Kept(without(m), torch.float32, m),
                "exp_avg_sq_col": Kept(without(n), torch.float32, n),
            }
        return layout | ({"exp_avg": Kept(p.shape, STATE_DTYPES[group["state_dtype"]])} if group["beta1"] else {})

    def translate(self, state_dict):
        """torch's names, and its d and beta2_decay. Raises ValueError for a namesake that computes otherwise than the
        group that is here."""
        options = {"d": "clip_threshold", "beta2_decay": "decay_rate"}
        ours = lambda values, names: {names.get(name, name): value for name, value in values.items()}
        # their number is checked later
        for saved, here in zip(state_dict["param_groups"], self.param_groups, strict=False):
            theirs = saved.get("variant") or ("torch" if "beta2_decay" in saved else "huggingface")
            if "variant" not in saved and here["variant"] != theirs:
                raise ValueError(
                    f"the state is that of {CLASSES[theirs]}, and this is variant {here['variant']!r}; build it with variant={theirs!r}"
                )
        groups = [ours(group, options) for group in state_dict["param_groups"]]
        for group in groups:
            if "lr" in group:
                group.setdefault("relative_step", group["lr"] is None)
        return {
            "state": {i: ours(values, NAMES["torch"]) for i, values in state_dict["state"].items()},
            "param_groups": groups,
        }

    def export(self, names: str) -> dict:
        """The state dict in the names and shapes of "torch" (torch.optim.Adafactor) or "huggingface"
        (transformers.Adafactor), states alone: load it with that class's own param_groups."""
        if names not in ("torch", "huggingface"):
            raise ValueError(f'names is {names!r}; choose from "torch", "huggingface"')
        exported = copy.deepcopy(self.state_dict()["state"])
        for values in exported.values():
            if names == "huggingface":
                values |= {"step": int(values["step"]), "RMS": 0}
                continue
            for theirs, ours in NAMES["torch"].items():
                if ours in values:
                    values[theirs] = values.pop(ours)
            if "row_var" in values:
                values["row_var"], values["col_var"] = values["row_var"].unsqueeze(-1), values["col_var"].unsqueeze(-2)
        return exported

    # -----------------------------------------------------------------------------------------------------------------
    # The step

    def update(self, group, part, coefficient, found_inf):
        scalars = self._scalars(group)
        for dtype, (shapes, shards, *chosen) in self._by_eps(group, part):
            eps = torch.finfo(dtype).eps if group["eps"][0] is None else group["eps"][0]
            adds = VARIANTS[group["variant"]].adds_eps
            args = (
                *chosen,
                coefficient,
                found_inf,
                *scalars[:5],
                eps if adds else 0.0,
                0.0 if adds else eps,
                *scalars[5:],
            )
            sharding.apply(adafactor, adafactor_rules, shapes, shards, *args)

    def _by_eps(self, group: dict, part: Part):
        """Shapes, shards and the op's lists, split by the parameters' dtype where eps depends on it; factored
        dimensions moved last."""
        dims = [factored_dims(shape, group) for shape in part.shapes]
        last = lambda xs: [
            x if d is None or d == (x.ndim - 2, x.ndim - 1) else x.movedim(d, (-2, -1))
            for x, d in zip(xs, dims, strict=True)
        ]
        row, col, whole = (part.states.get(name) for name in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"))
        if col is None:
            row, col = whole, [p.new_empty(0, dtype=torch.float32) for p in part.params]
        else:
            row, col = _last(row, dims, 0), _last(col, dims, 1)
        companions = last(part.companions) if part.companions else []
        exp_avgs = last(part.states["exp_avg"]) if "exp_avg" in part.states else []
        orders = [_order(len(shape), d) for shape, d in zip(part.shapes, dims, strict=True)]
        shapes = [torch.Size(shape[dim] for dim in order) for shape, order in zip(part.shapes, orders, strict=True)]
        shards = [
            tuple((order.index(dim), ranks) for dim, ranks in each)
            for each, order in zip(part.shards, orders, strict=True)
        ]
        lists = (
            shapes,
            shards,
            last(part.params),
            companions,
            part.keys,
            last(part.grads),
            row,
            col,
            exp_avgs,
            part.steps,
        )
        # every rank in one order
        dtypes = list(dict.fromkeys(p.dtype for p in part.params)) if group["eps"][0] is None else [torch.float32]
        if len(dtypes) == 1:
            return [(dtypes[0], lists)]
        pick = lambda dtype: [
            [x for x, p in zip(xs, part.params, strict=True) if p.dtype == dtype] if xs else [] for xs in lists
        ]
        return [(dtype, pick(dtype)) for dtype in dtypes]

    def _scalars(self, group: dict) -> tuple:
        variant = group["variant"]
        bound, relative, ramp = self._step_size(group)
        scale = T5_UNSCALED if variant == "t5" and group["relative_step"] else 1.0
        decay_by_step = VARIANTS[variant].decays == "by step"
        return (
            bound, relative, ramp, -group["decay_rate"], float(group["decay_offset"]), group["eps"][1], group["scale_parameter"], scale,
            group["clip_threshold"], group["beta1"] or 0.0, group["weight_decay"], decay_by_step,
        )  # fmt: skip

    def _step_size(self, group: dict) -> tuple[float, bool, float]:
        """(bound, whether time bounds it too, ramp of its warm-up)."""
        if not group["relative_step"]:
            return checks.number(group["lr"]), group["variant"] == "torch", torch.inf
        # 1/√t is at most 1
        return (1.0, True, WARMUP_RAMP) if group["warmup_init"] else (RELATIVE_BOUND, True, torch.inf)

    def _get_lr(self, group: dict, state: dict) -> float:
        """The step of the parameter with this state, at its size now, by the name that transformers.AdafactorSchedule
        calls. Reads the device."""
        bound, relative, ramp = self._step_size(group)
        t = max(1.0, float(state.get("step", 1.0)))
        rho = min(bound, ramp * t, t**-0.5) if relative else bound
        if not group["scale_parameter"]:
            return rho * (T5_UNSCALED if group["variant"] == "t5" and group["relative_step"] else 1.0)
        square = next(p for p in group["params"] if self.state.get(p) is state).detach().float().square().mean()
        return rho * max(group["eps"][1], float(square.full_tensor() if sharding.is_dtensor(square) else square) ** 0.5)


def _is_relative(group: dict) -> bool:
    """Whether the step depends on time alone: what the group says, or lr=None."""
    return group["lr"] is None if group["relative_step"] is None else group["relative_step"]


def factored_dims(shape: torch.Size, group: dict) -> tuple[int, int] | None:
    """The two dimensions whose squares are kept as row and column means, in order; None for a tensor that is not
    factored."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    if group["variant"] != "t5":
        dims = (len(shape) - 2, len(shape) - 1)
    else:
        by_size = sorted(range(len(shape)), key=lambda dim: shape[dim])  # ties: the later dimension counts as larger
        dims = tuple(sorted(by_size[-2:]))
    return dims if min(shape[dim] for dim in dims) >= group["min_dim_size_to_factor"] else None


def _order(ndim: int, dims: tuple[int, int] | None) -> list[int]:
    """The dimensions of a tensor once the factored ones are moved last."""
    return [dim for dim in range(ndim) if dim not in (dims or ())] + list(dims or ())


def _last(factors: list[Tensor], dims: list[tuple[int, int]], which: int) -> list[Tensor]:
    """Row factors (which = 0) or column factors (1) with the dimension that they keep moved last."""
    position = lambda d: d[0] if which == 0 else d[1] - 1  # of the kept dimension, once the other is gone
    return [x if position(d) == x.ndim - 1 else x.movedim(position(d), -1) for x, d in zip(factors, dims, strict=True)]

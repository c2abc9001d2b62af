"""Adafactor (Shazeer & Stern 2018), as T5, Hugging Face and torch have it."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.adafactor import AdafactorOptions, AdafactorUpdate, adafactor, adafactor_rules
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
        checks.pair(_are_eps, "give two of at least 0: of the squares, and of RMS(θ)", eps=group["eps"])
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
            rows, cols = (torch.Size(size for i, size in enumerate(p.shape) if i != lost) for lost in (m, n))
            layout = {
                "exp_avg_sq_row": Kept(rows, torch.float32, m),
                "exp_avg_sq_col": Kept(cols, torch.float32, n),
            }
        return layout | ({"exp_avg": Kept(p.shape, STATE_DTYPES[group["state_dtype"]])} if group["beta1"] else {})

    def translate(self, state_dict):
        """torch's names, and its d and beta2_decay. Raises ValueError for a namesake that computes otherwise than the
        group that is here."""
        options = {"d": "clip_threshold", "beta2_decay": "decay_rate"}
        # their number is checked later
        for saved, here in zip(state_dict["param_groups"], self.param_groups, strict=False):
            theirs = saved.get("variant") or ("torch" if "beta2_decay" in saved else "huggingface")
            if "variant" not in saved and here["variant"] != theirs:
                raise ValueError(
                    f"the state is that of {CLASSES[theirs]}, and this is variant {here['variant']!r}; build it with variant={theirs!r}"
                )
        groups = [_renamed(group, options) for group in state_dict["param_groups"]]
        for group in groups:
            if "lr" in group:
                group.setdefault("relative_step", group["lr"] is None)
        return {
            "state": {i: _renamed(values, NAMES["torch"]) for i, values in state_dict["state"].items()},
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
        for dtype, (shapes, shards, *lists) in self._by_eps(group, part):
            update = AdafactorUpdate(*lists, coefficient, found_inf)
            options = self._options(group, torch.finfo(dtype).eps if group["eps"][0] is None else group["eps"][0])
            if any(shards):
                sharding.apply(adafactor, adafactor_rules(shapes, update, options), shapes, shards)
            else:
                adafactor(*update, *options)

    def _by_eps(self, group: dict, part: Part):
        """Shapes, shards and the op's lists, split by the parameters' dtype where eps depends on it; factored
        dimensions moved last."""
        dims = [factored_dims(shape, group) for shape in part.shapes]
        row, col, whole = (part.states.get(name) for name in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"))
        if col is None:
            row, col = whole, [p.new_empty(0, dtype=torch.float32) for p in part.params]
        else:
            row, col = _factors_last(row, dims, 0), _factors_last(col, dims, 1)
        companions = _last(part.companions, dims) if part.companions else []
        exp_avgs = _last(part.states["exp_avg"], dims) if "exp_avg" in part.states else []
        orders = [_order(len(shape), d) for shape, d in zip(part.shapes, dims, strict=True)]
        shapes = [torch.Size(shape[dim] for dim in order) for shape, order in zip(part.shapes, orders, strict=True)]
        shards = [
            tuple((order.index(dim), ranks) for dim, ranks in each)
            for each, order in zip(part.shards, orders, strict=True)
        ]
        lists = (
            shapes,
            shards,
            _last(part.params, dims),
            companions,
            part.keys,
            _last(part.grads, dims),
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
        variant = VARIANTS[group["variant"]]
        bound, relative, ramp = self._step_size(group)
        return AdafactorOptions(
            lr=bound,
            relative_step=relative,
            ramp=ramp,
            decay_rate=-group["decay_rate"],
            decay_offset=float(group["decay_offset"]),
            eps_square=eps if variant.adds_eps else 0.0,
            eps_bound=0.0 if variant.adds_eps else eps,
            eps_scale=group["eps"][1],
            scale_parameter=group["scale_parameter"],
            scale=T5_UNSCALED if group["variant"] == "t5" and group["relative_step"] else 1.0,
            clip_threshold=group["clip_threshold"],
            beta1=group["beta1"] or 0.0,
            weight_decay=group["weight_decay"],
            decay_by_step=variant.decays == "by step",
        )

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


def _are_eps(first: float | None, second: float) -> bool:
    return (first is None or (checks.finite(first) and first >= 0)) and checks.finite(second) and second >= 0


def _is_relative(group: dict) -> bool:
    """Whether the step depends on time alone: what the group says, or lr=None."""
    return group["lr"] is None if group["relative_step"] is None else group["relative_step"]


def _renamed(values: dict, names: dict[str, str]) -> dict:
    return {names.get(name, name): value for name, value in values.items()}


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


def _last(tensors: list[Tensor], dims: list[tuple[int, int] | None]) -> list[Tensor]:
    """Tensors shaped like parameters with the factored dimensions moved last."""
    return [
        x if d is None or d == (x.ndim - 2, x.ndim - 1) else x.movedim(d, (-2, -1))
        for x, d in zip(tensors, dims, strict=True)
    ]


def _factors_last(factors: list[Tensor], dims: list[tuple[int, int]], which: int) -> list[Tensor]:
    """Row factors (which = 0) or column factors (1) with the dimension that they keep moved last."""
    places = [d[0] if which == 0 else d[1] - 1 for d in dims]  # of the kept dimension, once the other is gone
    return [x if place == x.ndim - 1 else x.movedim(place, -1) for x, place in zip(factors, places, strict=True)]

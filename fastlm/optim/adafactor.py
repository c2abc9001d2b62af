"""Adafactor (Shazeer & Stern 2018), as T5, Hugging Face and torch have it."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.adafactor import adafactor, adafactor_rules
from fastlm.optim import sharding
from fastlm.optim.base import STATE_DTYPES, Kept, Optimizer, Part, check_range, check_variant, number

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
NAMES = {"torch": {"row_var": "exp_avg_sq_row", "col_var": "exp_avg_sq_col", "variance": "exp_avg_sq"}}


class Adafactor(Optimizer, name="adafactor"):
    """Adafactor: n + m numbers of state for an n × m matrix, steps relative to the parameter's own size.

    variant         factors                            lr                                                        eps[0] (default)
    "t5"            the two largest dimensions, both   None: ρ = min(0.01, 1/√t), times 0.05 if scale_parameter  added to g² (1e-30)
                    ≥ min_dim_size_to_factor (128)     is False; or a number
    "huggingface"   the last two                       None: ρ = min(0.01, 1/√t); or a number                    added to g² (1e-30)
    "torch"         the last two                       a number (0.01): ρ = min(lr, 1/√t)                        bounds √V (the dtype's)

    The step is ρ · max(eps[1], RMS(θ)), or ρ with scale_parameter=False. warmup_init: ρ = min(1e-6·t, 1/√t). beta1: momentum of the
    scaled update, which costs a state of the parameter's size. clip_threshold: of the update's RMS. decay_offset: steps after which the
    decay of averages starts anew, for fine-tuning. weight_decay: "huggingface" multiplies it by the parameter's step, "torch" by lr,
    "t5" has none. huggingface's relative_step=True says lr=None; torch's `d` and `beta2_decay` are clip_threshold and decay_rate,
    and are accepted. foreach is accepted and changes nothing. common: max_grad_norm, master, state_dtype, seed of every fastlm
    optimizer (`Optimizer`). Raises ValueError for what a variant does not have, naming what it has.
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
        check_variant(variant, VARIANTS)
        theirs = VARIANTS[variant].defaults
        given = dict(lr=lr, eps=eps, min_dim_size_to_factor=min_dim_size_to_factor)
        defaults = {name: theirs[name] if value is None else value for name, value in given.items()} | dict(
            clip_threshold=clip_threshold if d is None else d,
            decay_rate=decay_rate if beta2_decay is None else beta2_decay,
            beta1=beta1, weight_decay=weight_decay, scale_parameter=scale_parameter, warmup_init=warmup_init, variant=variant,
            decay_offset=decay_offset, maximize=maximize,
        )  # fmt: skip
        if relative_step is not None and variant != "torch" and relative_step != (lr is None):
            raise ValueError(f"relative_step={relative_step} and lr={lr} do not go together: lr=None is the relative step, a number is the step")
        super().__init__(params, defaults, **common)

    def check(self, group):
        super().check(group)
        variant, lr = group["variant"], group["lr"]
        check_variant(variant, VARIANTS)
        check_range(**{"lr": 0.0 if lr is None else lr, "eps[0]": group["eps"][0] or 0.0, "eps[1]": group["eps"][1], "weight_decay": group["weight_decay"]})
        if not group["decay_rate"] <= 0:
            raise ValueError(f"decay_rate is {group['decay_rate']}; it is the exponent of t and at most 0, as -0.8")
        if not group["clip_threshold"] > 0:
            raise ValueError(f"clip_threshold is {group['clip_threshold']}; it must be positive")
        if not 0 <= (group["beta1"] or 0.0) < 1:
            raise ValueError(f"beta1 is {group['beta1']}; it must lie in [0, 1), or be None for no momentum")
        if group["warmup_init"] and (lr is not None or variant == "torch"):
            raise ValueError('warmup_init is a form of the relative step: it takes lr=None and variant "t5" or "huggingface"')
        if variant == "torch" and (group["beta1"] or not group["scale_parameter"] or lr is None):
            raise ValueError('variant "torch" has no momentum, always scales by the parameter and needs an lr; "huggingface" and "t5" have the choice')
        if variant == "t5" and group["weight_decay"]:
            raise ValueError('variant "t5" has no weight decay; "huggingface" decays by the parameter\'s step, "torch" by lr')

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def layout(self, p, group):
        dims = factored_dims(p.shape, group)
        if dims is None:
            layout = {"exp_avg_sq": Kept(p.shape, torch.float32)}
        else:
            n, m = dims
            without = lambda dim: torch.Size(size for i, size in enumerate(p.shape) if i != dim)
            layout = {"exp_avg_sq_row": Kept(without(m), torch.float32, m), "exp_avg_sq_col": Kept(without(n), torch.float32, n)}
        return layout | ({"exp_avg": Kept(p.shape, STATE_DTYPES[group["state_dtype"]])} if group["beta1"] else {})

    def translate(self, state_dict):
        """torch's names, and its eps, d and beta2_decay."""
        renamed = copy.copy(state_dict)
        ours = lambda values: {NAMES["torch"].get(name, name): value for name, value in values.items()}
        renamed["state"] = {i: ours(values) for i, values in state_dict["state"].items()}
        options = {"d": "clip_threshold", "beta2_decay": "decay_rate"}
        renamed["param_groups"] = [{options.get(name, name): value for name, value in group.items()} for group in state_dict["param_groups"]]
        return renamed

    def export(self, names: str) -> dict:
        """The state dict in the names and shapes of "torch" (torch.optim.Adafactor) or "huggingface" (transformers.Adafactor), states alone:
        load it with that class's own param_groups."""
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
            args = *chosen, coefficient, found_inf, *scalars[:5], eps if adds else 0.0, 0.0 if adds else eps, *scalars[5:]
            sharding.apply(adafactor, adafactor_rules, shapes, shards, *args)

    def _by_eps(self, group: dict, part: Part):
        """Shapes, shards and the op's lists, split by the parameters' dtype where eps depends on it; factored dimensions moved last."""
        dims = [factored_dims(shape, group) for shape in part.shapes]
        last = lambda xs: [x if d is None or d == (x.ndim - 2, x.ndim - 1) else x.movedim(d, (-2, -1)) for x, d in zip(xs, dims, strict=True)]
        row, col, whole = (part.states.get(name) for name in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"))
        if col is None:
            row, col = whole, [p.new_empty(0, dtype=torch.float32) for p in part.params]
        else:
            row, col = _last(row, dims, 0), _last(col, dims, 1)
        companions = last(part.companions) if part.companions else []
        exp_avgs = last(part.states["exp_avg"]) if "exp_avg" in part.states else []
        orders = [_order(len(shape), d) for shape, d in zip(part.shapes, dims, strict=True)]
        shapes = [torch.Size(shape[dim] for dim in order) for shape, order in zip(part.shapes, orders, strict=True)]
        shards = [tuple((order.index(dim), ranks) for dim, ranks in each) for each, order in zip(part.shards, orders, strict=True)]
        lists = shapes, shards, last(part.params), companions, part.keys, last(part.grads), row, col, exp_avgs, part.steps
        dtypes = {p.dtype for p in part.params} if group["eps"][0] is None else {torch.float32}
        if len(dtypes) == 1:
            return [(dtypes.pop(), lists)]
        pick = lambda dtype: [[x for x, p in zip(xs, part.params, strict=True) if p.dtype == dtype] if xs else [] for xs in lists]
        return [(dtype, pick(dtype)) for dtype in dtypes]

    def _scalars(self, group: dict) -> tuple:
        variant, lr = group["variant"], group["lr"]
        relative = lr is None or variant == "torch"
        bound = number(lr) if lr is not None else 1.0 if group["warmup_init"] else RELATIVE_BOUND  # 1/√t is at most 1
        scale = T5_UNSCALED if variant == "t5" and lr is None else 1.0
        ramp = WARMUP_RAMP if group["warmup_init"] else torch.inf
        decay_by_step = VARIANTS[variant].decays == "by step"
        return (
            bound, relative, ramp, -group["decay_rate"], float(group["decay_offset"]), group["eps"][1], group["scale_parameter"], scale,
            group["clip_threshold"], group["beta1"] or 0.0, group["weight_decay"], decay_by_step,
        )  # fmt: skip


def factored_dims(shape: torch.Size, group: dict) -> tuple[int, int] | None:
    """The two dimensions whose squares are kept as row and column means, in order; None for a tensor that is not factored."""
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

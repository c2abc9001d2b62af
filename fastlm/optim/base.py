"""What every optimizer of fastlm shares: the step around an op, the state of a parameter, and how 16-bit parameters are kept.

With `max_grad_norm`, or under a `GradScaler`, a step first reads the gradients once for their norm, then updates; a norm that is
not finite skips the step and leaves every bit as it was, the step count included. The host waits for nothing: `grad_norm` and
`overflow` are tensors on the parameters' device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.sums import Shards
from fastlm.ops.unscale import grad_stats
from fastlm.optim import sharding

OPTIMIZERS: dict[str, type["Optimizer"]] = {}
OF_ALL_GROUPS = ("max_grad_norm", "seed", "process_group")  # kept in an optimizer's defaults, as what copies and pickles keep
MASTERS = (None, "fp32", "remainder", "stochastic")
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPANIONS = {"fp32": ("master", torch.float32), "remainder": ("remainder", torch.int16)}  # a master's name in the state, and its dtype


class Kept(NamedTuple):
    """A tensor of a parameter's state. lost: the parameter's dimension that it is an average over."""

    shape: torch.Size
    dtype: torch.dtype
    lost: int | None = None


Layout = dict[str, Kept]
Pair = tuple[Tensor, Tensor]  # a parameter and what of its gradient lies on this rank


class Part(NamedTuple):
    """Parameters of one group that are kept in one way, as an op takes them: what of them lies on this rank.

    shapes: of the whole parameters; shards: how each is divided among ranks, () if it is not.
    """

    params: list[Tensor]
    companions: list[Tensor]
    keys: list[int]
    grads: list[Tensor]
    steps: list[Tensor]
    states: dict[str, list[Tensor]]
    shapes: list[torch.Size]
    shards: list[Shards]


class Optimizer(torch.optim.Optimizer):
    """Subclasses define `layout` and `update`.

    max_grad_norm: clip the gradients' global norm over all groups to this; None for no clipping.
    grad_norm: the last step's norm before clipping, an fp32 scalar tensor; None if the step did not need it.
    overflow: 1 if the last step was skipped because a gradient was not finite, an fp32 scalar tensor; None if not looked at.

    master says where a 16-bit parameter keeps what its 16 bits cannot hold: None, nowhere (updates are rounded to nearest); "fp32", in
    a master copy; "remainder" (bf16), in 16 more bits, exactly; "stochastic" (bf16), nowhere, but updates are rounded by noise
    whose mean is right, drawn from (seed, step, parameter, element). fp32 parameters need none and take no notice.
    state_dtype: "fp32" or "bf16", of the states shaped like the parameter. Both may differ between groups.

    Parameters may be DTensors, sharded or replicated on any mesh (sharding.py). process_group: ranks whose optimizers hold other
    parameters of the same model (ZeroRedundancyOptimizer, pipeline stages); norm and overflow are then of all of them.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler hands grad_scale and found_inf over instead of unscaling

    def __init_subclass__(cls, name: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:  # trainers wrap an optimizer in a subclass without one
            OPTIMIZERS[name] = cls

    def __init__(
        self, params, defaults: dict, *, max_grad_norm: float | None = None, master: str | None = None, state_dtype: str = "fp32", seed: int = 0,
        process_group=None,
    ):  # fmt: skip
        self.grad_norm: Tensor | None = None
        self.overflow: Tensor | None = None
        super().__init__(params, defaults | dict(master=master, state_dtype=state_dtype))
        self.max_grad_norm = max_grad_norm
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed is {seed}; it must lie in [0, 2³¹)")
        self.defaults |= dict(seed=seed, process_group=process_group)

    @property
    def process_group(self):
        return self.defaults["process_group"]

    @property
    def max_grad_norm(self) -> float | None:
        return self.defaults["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"max_grad_norm is {value}; give a positive norm, or None for no clipping")
        self.defaults["max_grad_norm"] = value  # in defaults, which copies and pickles keep; it is not a group's option

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for name in OF_ALL_GROUPS:
            self.param_groups[-1].pop(name, None)
        group = self.param_groups[-1]
        try:
            self.check(group)
        except ValueError:
            del self.param_groups[-1]
            raise

    def check(self, group: dict) -> None:
        """Raise ValueError, naming what is legal, if the group's options do not fit each other or its parameters."""
        if group["master"] not in MASTERS:
            raise ValueError(f"master is {group['master']!r}; choose from {', '.join(map(repr, MASTERS))}")
        if group["state_dtype"] not in STATE_DTYPES:
            raise ValueError(f"state_dtype is {group['state_dtype']!r}; choose from {', '.join(map(repr, STATE_DTYPES))}")
        for p in group["params"]:
            sharding.check(p)
            if p.is_complex():
                raise ValueError(f"a parameter of shape {list(p.shape)} is complex; fastlm's optimizers take real ones (torch.view_as_real gives a view)")
            if p.dtype == torch.float64:
                raise ValueError(f"a parameter of shape {list(p.shape)} is fp64, and fastlm's optimizers compute in fp32; torch.optim's compute in fp64")
            if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
                raise ValueError(f"a parameter of shape {list(p.shape)} is expanded, so its elements share memory; give its .contiguous() copy, or the base")
            if p.dtype == torch.float16 and group["master"] in ("remainder", "stochastic"):
                raise ValueError(f"master={group['master']!r} is for bf16 parameters and one of shape {list(p.shape)} is fp16; legal there: None, 'fp32'")

    # -----------------------------------------------------------------------------------------------------------------
    # The step

    @torch._disable_dynamo  # the ops are opaque to torch.compile, which would compile a step again for every new lr
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [(p, _checked_grad(p)) for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        params = [p for group in self.param_groups for p in group["params"]]
        pairs = [pair for _, members in groups for pair in members]
        self.grad_norm = self.overflow = None
        ranks = sharding.groups_of(params, self.process_group)
        if pairs or ranks:
            coefficient, self.overflow = self._coefficient(params, pairs, ranks)
            for group, members in groups:
                sign = coefficient
                if members and group.get("maximize"):
                    sign = -torch.ones((), device=params[0].device) if coefficient is None else -coefficient
                for part in self._parts(group, members):
                    self.update(group, part, sign, self.overflow)
        return loss

    def update(self, group: dict, part: Part, coefficient: Tensor | None, found_inf: Tensor | None) -> None:
        """Apply this optimizer's op to a part of one group."""
        raise NotImplementedError

    def _coefficient(self, params: list[Tensor], pairs: list[Pair], ranks: tuple) -> tuple[Tensor | None, Tensor | None]:
        """(factor that unscales and clips, overflow flag), each None when there is nothing to do; the same on all of `ranks`.

        A scaler hands over grad_scale (what the loss was multiplied by) and, if it looked already, found_inf.
        """
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        found_inf = None if found_inf is None else sharding.agreed(found_inf, ranks)
        if self.max_grad_norm is None and (scale is None or found_inf is not None):
            return (None if scale is None else scale.reciprocal()), found_inf
        looked_at = [sharding.norms(params, pairs, self.process_group)] if ranks else [grad for _, grad in pairs]
        self.grad_norm, coefficient, overflow = grad_stats(looked_at, scale, self.max_grad_norm or 0.0).unbind()
        return coefficient, overflow if found_inf is None else torch.maximum(overflow, found_inf)

    def _parts(self, group: dict, pairs: list[Pair]) -> list[Part]:
        """The parameters by how they are kept, which states they have, and whether they are DTensors and divided among ranks."""
        kinds: dict[tuple, list[Pair]] = {}
        layouts: dict[tuple, Layout] = {}  # a model has few shapes
        for p, grad in pairs:
            shape = p.shape, p.dtype
            if shape not in layouts:
                layouts[shape] = self.full_layout(p, group)
            names = self._state(p, layouts[shape])
            mesh = sharding.is_dtensor(p)
            kinds.setdefault((master_of(p, group), mesh, mesh and bool(sharding.shards(p)), *names), []).append((p, grad))
        return [self._part(master, mesh, names, members) for (master, mesh, _, *names), members in kinds.items()]

    def _part(self, master: str | None, mesh: bool, names: list[str], pairs: list[Pair]) -> Part:
        here = (lambda xs: [sharding.local(x) for x in xs]) if mesh else lambda xs: xs
        params = [p for p, _ in pairs]
        kept = [self.state[p] for p in params]
        states = {name: here([state[name] for state in kept]) for name in names}
        companions = states.pop(COMPANIONS[master][0]) if master in COMPANIONS else []
        keys = self._keys(params) if master == "stochastic" else []
        shards = [sharding.shards(p) for p in params] if mesh else [()] * len(params)
        return Part(here(params), companions, keys, [grad for _, grad in pairs], states.pop("step"), states, [p.shape for p in params], shards)

    def _keys(self, params: list[Tensor]) -> list[int]:
        """Philox keys: the seed, and the parameter's number among all of the optimizer's; every shard draws its own noise."""
        number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        return [self.defaults["seed"] << 32 | number[p] + len(number) * sharding.shard_number(p) for p in params]

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def layout(self, p: Tensor, group: dict) -> Layout:
        """Each state of a parameter of p's shape and dtype, besides its step and what keeps it exact."""
        raise NotImplementedError

    def full_layout(self, p: Tensor, group: dict) -> Layout:
        """Everything that is kept for a parameter."""
        kept = {"step": Kept(torch.Size(), torch.float32), **self.layout(p, group)}
        master = master_of(p, group)
        if master in COMPANIONS:
            name, dtype = COMPANIONS[master]
            kept[name] = Kept(p.shape, dtype)
        return kept

    def _state(self, p: Tensor, layout: Layout) -> tuple[str, ...]:
        """Make what is missing of a parameter's state: zeros, and a master of the parameter itself. Returns the names."""
        state = self.state[p]
        for name, kept in layout.items():
            if name not in state:
                state[name] = p.detach().to(kept.dtype, copy=True) if name == "master" else _zeros(p, kept)
        return tuple(layout)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict of this optimizer or of a namesake. Every state gets the dtype it has here, on the parameter's device."""
        state_dict = self.translate(state_dict)
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            self.check(group)
        for i, (p, group) in zip(saved, owners, strict=True):  # torch casts states to the parameter's dtype, which loses bits in bf16
            layout, values = self.full_layout(p, group), state_dict["state"].get(i, {})
            kept = {name: torch.as_tensor(values[name]) for name in layout if name in values}
            if kept:
                self.state[p] = {name: _loaded(value, p, layout[name]) for name, value in kept.items()}

    def translate(self, state_dict: dict) -> dict:
        """A state dict of a namesake in this optimizer's names; others as they are."""
        return state_dict

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a namesake's groups lack the options that only we have
            for name, value in self.defaults.items():
                if name not in OF_ALL_GROUPS:
                    group.setdefault(name, value)


def master_of(p: Tensor, group: dict) -> str | None:
    """The group's `master`, where the parameter needs one."""
    return None if p.dtype not in (torch.bfloat16, torch.float16) else group["master"]


def _zeros(p: Tensor, kept: Kept) -> Tensor:
    """Zeros in the parameter's memory order and on its mesh, where they have anything of its shape."""
    if kept.lost is not None:
        return sharding.zeros(p, *kept)
    if kept.shape == p.shape:
        return torch.zeros_like(p, dtype=kept.dtype, memory_format=torch.preserve_format)
    return torch.zeros(kept.shape, dtype=kept.dtype, device=p.device)


def _loaded(value: Tensor, p: Tensor, kept: Kept) -> Tensor:
    """A copy of a saved state, laid out as it is kept here."""
    out, value = _zeros(p, kept), value.detach()
    if value.numel() != out.numel():
        raise ValueError(f"a saved state has shape {list(value.shape)}, and a parameter of shape {list(p.shape)} needs {list(out.shape)} here")
    if value.shape != out.shape:
        value = value.reshape(out.shape)
    return out.copy_(sharding.placed_as(value, out))


def _checked_grad(p: Tensor) -> Tensor:
    if p.grad.layout != torch.strided:
        raise ValueError(f"a parameter of shape {list(p.shape)} has a sparse gradient; build its Embedding with sparse=False, or use torch.optim.SparseAdam")
    return sharding.local_grad(p)


def check_range(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")


def check_betas(betas: tuple[float, float]) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; give two, each in [0, 1)")


def check_variant(variant: str, variants) -> None:
    if variant not in variants:
        raise ValueError(f"variant is {variant!r}; choose from {', '.join(map(repr, variants))}")


def number(lr: float | Tensor) -> float:
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        raise ValueError("lr is a tensor on the device, and reading it would stall the step; give a number or a CPU tensor")
    return float(lr)


def moments_layout(p: Tensor, group: dict) -> Layout:
    """exp_avg and exp_avg_sq, shaped like the parameter: Adam's family."""
    kept = Kept(p.shape, STATE_DTYPES[group["state_dtype"]])
    return {"exp_avg": kept, "exp_avg_sq": kept}

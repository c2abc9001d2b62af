"""What every optimizer of fastlm shares: its options, the step around an op, and the state of each parameter.

With `max_grad_norm`, or under a `GradScaler`, a step first reads the gradients once for their norm, then updates. If
the norm is not finite, the step is skipped and every bit stays, the step count too. The host waits for nothing.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.optim.sums import Shards
from fastlm.ops.optim.unscale import grad_stats
from fastlm.optim import checks, loading, namesakes, sharding
from fastlm.optim.loading import OF_ALL_GROUPS
from fastlm.optim.states import MASTER_STATES, MASTERS, STATE_DTYPES, StateSpec, StateSpecs, master_of, zeros

# by name; a plugin may add any class of torch.optim.Optimizer, for which the trainer clips
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {}
Pair = tuple[Tensor, Tensor]  # a parameter and what of its gradient lies on this rank


class Part(NamedTuple):
    """Parameters of one group that are kept in one way, as an op takes them: what of them lies on this rank.

    shapes: of the whole parameters; shards: how each is divided among ranks, () if it is not.
    """

    params: list[Tensor]
    masters: list[Tensor]
    keys: list[int]
    grads: list[Tensor]
    steps: list[Tensor]
    states: dict[str, list[Tensor]]
    shapes: list[torch.Size]
    shards: list[Shards]


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose step also unscales and clips. Subclasses define `state_specs` and `update`.

    Args:
        params: parameters in fp32, bf16 or fp16, or groups of them, as torch.optim takes them; DTensors too, sharded or
            replicated on any mesh (sharding.py).
        defaults: the subclass's own options, which groups may change.
        max_grad_norm: clip the global norm of all groups' gradients to this; inf: compute the norm only; None: neither.
        master: None, "fp32", "remainder" (bf16) or "stochastic" (bf16): where a 16-bit parameter keeps what its 16 bits
            cannot hold (states.py). Groups may differ. Default None.
        state_dtype: "fp32" or "bf16", of the states shaped like the parameter. Groups may differ. Default "fp32".
        seed: of stochastic rounding, in [0, 2³¹). Default 0. The state dict holds neither seed nor max_grad_norm: give
            the same again to go on with the same bits.
        process_group: ranks whose optimizers hold other parameters of the same model (pipeline stages), which share
            norm and overflow. Copies share it, pickles leave it out. ZeroRedundancyOptimizer needs it for
            max_grad_norm: give it partial(AdamW, process_group=dist.group.WORLD) as the class.
        fused: True lets torch's GradScaler leave unscaling to the step, as with torch's fused optimizers; trainers that
            clip then refuse. fastlm's scaler always does.
        theirs: options of namesakes that ours lack, taken where they say what is done here anyway (namesakes.py).

    Attributes:
        grad_norm: the last step's norm before clipping, an fp32 scalar on the device; None if no norm was needed.
        overflow: 1 if the last step was skipped because a gradient was not finite, likewise; None if not looked at.

    Raises:
        ValueError: for options and parameters that do not fit, naming what is legal; TypeError: for unknown arguments.

    A captured CUDA graph keeps its learning rate: capture again when it changes.
    """

    grad_norm: Tensor | None = None
    overflow: Tensor | None = None
    process_group = None

    def __init_subclass__(cls, name: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:  # trainers wrap an optimizer in a subclass without one
            OPTIMIZERS[name] = cls

    def __init__(
        self,
        params,
        defaults: dict,
        *,
        max_grad_norm: float | None = None,
        master: str | None = None,
        state_dtype: str = "fp32",
        seed: int = 0,
        process_group=None,
        fused: bool | None = None,
        **theirs,
    ):
        if max_grad_norm is not None:
            checks.bound(max_grad_norm=max_grad_norm)
        checks.whole(0, seed=seed)
        if seed >= 2**31:
            raise ValueError(f"seed is {seed}; it must lie in [0, 2³¹)")
        checks.process_group(process_group)
        self.process_group = process_group
        ours = dict(master=master, state_dtype=state_dtype, fused=fused, max_grad_norm=max_grad_norm, seed=seed)
        super().__init__(params, defaults | ours)
        namesakes.check_arguments(type(self).__name__, theirs, self.fixed(self.defaults))
        namesakes.check_options(theirs, self.fixed(self.defaults))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler hands grad_scale and found_inf over. Ranks of a process group must all step."""
        return bool(self.defaults["fused"]) or self.process_group is not None

    @property
    def max_grad_norm(self) -> float | None:
        return self.defaults["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None:
            checks.bound(max_grad_norm=value)
        self.defaults["max_grad_norm"] = value  # in defaults, which copies and pickles keep; it is not a group's option

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in OF_ALL_GROUPS:
                value = group.pop(name)
                if value != self.defaults[name]:
                    of_all = f"{self.defaults[name]!r} of all groups; give it to the optimizer itself"
                    raise ValueError(f"{name} is {value!r} in a group, and {of_all}")
            self._check(group)
        except Exception:
            del self.param_groups[-1]
            raise

    def _check(self, group: dict) -> None:
        self.check(group)
        namesakes.check_options(group, self.fixed(group))

    def check(self, group: dict) -> None:
        """Raise ValueError, naming what is legal, if the group's options do not fit each other or its parameters."""
        checks.one_of(MASTERS, master=group["master"])
        checks.one_of(STATE_DTYPES, state_dtype=group["state_dtype"])
        if "maximize" in group:
            checks.flag(maximize=group["maximize"])
        for p in group["params"]:
            checks.parameter(p, group["master"])

    def fixed(self, group: dict) -> dict:
        """Options of namesakes that have one value here, in such a group, with that value; namesakes.CURES has each."""
        return {"amsgrad": False, "differentiable": False, "master_weights": False}

    def __deepcopy__(self, memo: dict) -> "Optimizer":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other.process_group = self.process_group
        return other

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
        for group in self.param_groups:  # which may have been written to since they were checked
            namesakes.check_options(group, self.fixed(group))
        groups = [(group, _with_grads(group["params"])) for group in self.param_groups]
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
                    device = part.params[0].device
                    self.update(group, part, *(x if x is None else x.to(device) for x in (sign, self.overflow)))
        return loss

    def update(self, group: dict, part: Part, coefficient: Tensor | None, found_inf: Tensor | None) -> None:
        """Apply this optimizer's op to a part of one group."""
        raise NotImplementedError

    def _coefficient(
        self, params: list[Tensor], pairs: list[Pair], ranks: tuple
    ) -> tuple[Tensor | None, Tensor | None]:
        """(factor that unscales and clips, overflow flag), None for nothing to do; the same on all of `ranks`.

        A scaler hands over grad_scale (what the loss was multiplied by) and, if it looked already, found_inf.
        """
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        found_inf = None if found_inf is None else sharding.all_reduce_max(found_inf, ranks)
        if self.max_grad_norm is None and (scale is None or found_inf is not None):
            return (None if scale is None else scale.reciprocal()), found_inf
        apart = ranks or len({grad.device for _, grad in pairs}) > 1
        looked_at = [sharding.norms(params, pairs, self.process_group)] if apart else [grad for _, grad in pairs]
        device = looked_at[0].device
        scale, found_inf = (None if x is None else x.to(device) for x in (scale, found_inf))
        self.grad_norm, coefficient, overflow = grad_stats(looked_at, scale, self.max_grad_norm or 0.0).unbind()
        return coefficient, overflow if found_inf is None else torch.maximum(overflow, found_inf)

    def _parts(self, group: dict, pairs: list[Pair]) -> list[Part]:
        """The parameters by how they are kept: master, device, states; whether they are DTensors, and divided."""
        kinds: dict[tuple, list[Pair]] = {}
        specs: dict[tuple, StateSpecs] = {}  # a model has few shapes
        for p, grad in pairs:
            shape = p.shape, p.dtype
            if shape not in specs:
                specs[shape] = self.full_state_specs(p, group)
            names = self._state(p, specs[shape])
            mesh = sharding.is_dtensor(p)
            kinds.setdefault(
                (master_of(p, group), mesh, mesh and bool(sharding.shards(p)), p.device, *names), []
            ).append((p, grad))
        return [self._part(master, mesh, names, members) for (master, mesh, _, _, *names), members in kinds.items()]

    def _part(self, master: str | None, mesh: bool, names: list[str], pairs: list[Pair]) -> Part:
        def here(xs: list[Tensor]) -> list[Tensor]:
            return [sharding.local(x) for x in xs] if mesh else xs

        params = [p for p, _ in pairs]
        states = {name: here([self.state[p][name] for p in params]) for name in names}
        masters = states.pop(MASTER_STATES[master][0]) if master in MASTER_STATES else []
        keys = self._keys(params) if master == "stochastic" else []
        shards = [sharding.shards(p) for p in params] if mesh else [()] * len(params)
        steps, shapes = states.pop("step"), [p.shape for p in params]
        return Part(here(params), masters, keys, [grad for _, grad in pairs], steps, states, shapes, shards)

    def _keys(self, params: list[Tensor]) -> list[int]:
        """Philox keys: the seed, and the parameter's number among all; every shard draws its own noise."""
        number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        return [self.defaults["seed"] << 32 | number[p] + len(number) * sharding.shard_number(p) for p in params]

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def state_specs(self, p: Tensor, group: dict) -> StateSpecs:
        """Each state of a parameter of p's shape and dtype, besides its step and its master."""
        raise NotImplementedError

    def full_state_specs(self, p: Tensor, group: dict) -> StateSpecs:
        """Each state of a parameter, with its step and its master."""
        specs = {"step": StateSpec(torch.Size(), torch.float32), **self.state_specs(p, group)}
        master = master_of(p, group)
        if master in MASTER_STATES:
            name, dtype = MASTER_STATES[master]
            specs[name] = StateSpec(p.shape, dtype)
        return specs

    def _state(self, p: Tensor, specs: StateSpecs) -> tuple[str, ...]:
        """Make what is missing of a parameter's state: zeros, or a master copy of it. Returns the names."""
        state = self.state[p]
        for name, spec in specs.items():
            if name not in state:
                state[name] = p.detach().to(spec.dtype, copy=True) if name == "master" else zeros(p, spec)
        return tuple(specs)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict of this optimizer or of a namesake; options that a namesake's groups lack stay as they are.

        Every state gets the dtype it has here, on the parameter's device. Raises ValueError, and changes nothing, if an
        option or a state does not fit.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        namesakes.check_owner(type(self), state_dict, {*self.defaults, *self.fixed(self.defaults)})
        state_dict = self.translate(loading.counted_by_parameter(state_dict))
        groups = loading.merged(self.param_groups, state_dict["param_groups"])
        for group, saved in zip(groups, state_dict["param_groups"], strict=True):
            self._check(group)
            namesakes.check_options(saved, {"max_grad_norm": self.max_grad_norm or 0.0})
        state = loading.states(state_dict, groups, self.full_state_specs, type(self).__name__)
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def translate(self, state_dict: dict) -> dict:
        """A state dict of a namesake in this optimizer's names; others as they are."""
        return state_dict


def _with_grads(params: list[Tensor]) -> list[Pair]:
    return [(p, _grad(p)) for p in params if p.grad is not None]


def _grad(p: Tensor) -> Tensor:
    checks.gradient(p)
    return sharding.local_grad(p)

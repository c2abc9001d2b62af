"""Loss scaling for fp16 training, without the host waiting for the device.

`GradScaler` is torch's, with its interface and state dict, and more:

* With a `fastlm.optim` optimizer, `step` reads the gradients once instead of three times: unscaling, overflow check,
  clipping and update are one pass.
* Other optimizers that keep everything in `state` and `param_groups`, torch.optim's among them, are stepped, and where
  a gradient overflowed they are put back by a predicated copy; torch would wait for the flag first. Only a step that
  makes, replaces or counts state in Python still waits, as an optimizer's first does.
* An optimizer with attributes or objects of its own, which no copy could put back, waits for the flag and is skipped,
  as by torch's scaler.
* fp16 gradients are allowed; there are hysteresis and a floor for the scale; overflow is shared with other ranks.

Loss scaling is of Micikevicius et al. 2018.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fastlm.ops.optim.unscale import unscale
from fastlm.optim import Optimizer, checks, sharding

HELD = (Tensor, int, float, str, torch.dtype)  # what a state may hold for a copy to put it back
PRESETS: dict[str, dict] = {
    "torch": dict(init_scale=2.0**16, growth_interval=2000),
    # its interval is for one worker, one micro-batch
    "fairseq": dict(init_scale=2.0**7, growth_interval=2**14, min_scale=1e-4),
    "deepspeed": dict(init_scale=2.0**16, growth_interval=1000, hysteresis=2, min_scale=1.0),
    "megatron": dict(init_scale=2.0**32, growth_interval=1000, hysteresis=2, min_scale=1.0),
}


class GradScaler(torch.amp.GradScaler):
    """Loss scaling (Micikevicius et al. 2018, sec. 3.2) by a factor that adapts; a drop-in for torch.amp.GradScaler.

    Args:
        device: device type of the scale. Default "cuda".
        init_scale: the first scale; positive, at least min_scale. Default 65536.
        growth_factor: the scale is multiplied by it after growth_interval steps without overflow. Default 2.
        backoff_factor: the scale is multiplied by it after an overflow. Default 0.5.
        growth_interval: in steps; at least 1. Default 2000.
        enabled: False leaves losses and gradients as they are. Default True.
        hysteresis: which overflow, since the scale last grew, is the first to lower it. Default 1: each lowers it.
        min_scale: the scale never falls below it; `check()` raises once it would have. Default 0.
        process_group: ranks that skip together though their gradients differ without DTensors saying so (FSDP1,
            pipeline stages). Ranks that share a DTensor do anyway. None: no others.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        hysteresis: int = 1,
        min_scale: float = 0.0,
        process_group=None,
    ):
        checks.positive(init_scale=init_scale)
        checks.at_least_zero(min_scale=min_scale)
        # a hysteresis of 1 forgives no overflow
        checks.whole(1, growth_interval=growth_interval, hysteresis=hysteresis)
        checks.process_group(process_group)
        if min_scale > init_scale:
            raise ValueError(f"min_scale is {min_scale} and init_scale {init_scale}; begin at the floor or above")
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self.hysteresis, self.min_scale, self.process_group = hysteresis, min_scale, process_group
        self._forgiven: Tensor | None = None  # overflows that may still be forgiven, and 1
        self._exhausted: Tensor | None = None  # 1 once the scale would have fallen below the floor

    @classmethod
    def preset(cls, name: str, device: str = "cuda", **changes) -> "GradScaler":
        """The scaler that another library uses: its init_scale, growth_interval, hysteresis and min_scale.

        Args:
            name: "torch", "fairseq", "deepspeed" or "megatron".
            device: device type of the scale. Default "cuda".
            changes: arguments of `GradScaler` that differ from the preset.

        Raises:
            ValueError: for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"scaler preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
        return cls(device, **PRESETS[name] | changes)

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs):
        """Unscale, check and step; skips on overflow. Call `update()` after all optimizers have stepped.

        Returns what optimizer.step returns. Raises RuntimeError if it has stepped since the last `update()`.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update()")
        if isinstance(optimizer, Optimizer):
            result = self._step_ours(optimizer, state, *args, **kwargs)
        elif (
            getattr(optimizer, "_step_supports_amp_scaling", False)
            or args
            or kwargs
            or not optimizer.state
            or not _can_be_put_back(optimizer)
        ):
            return super().step(optimizer, *args, **kwargs)
        else:
            if state["stage"] is OptState.READY:
                self.unscale_(optimizer)
            result = _step_predicated(optimizer, _any(state["found_inf_per_device"].values()))
        state["stage"] = OptState.STEPPED
        return result

    def _step_ours(self, optimizer: Optimizer, state: dict, *args, **kwargs):
        if state["stage"] is OptState.READY and self.process_group is None:
            optimizer.grad_scale = self._scale  # the optimizer unscales and looks by itself
        else:
            if state["stage"] is OptState.READY:
                self.unscale_(optimizer)  # every rank must know before any steps
            optimizer.found_inf = _any(state["found_inf_per_device"].values())
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            optimizer.__dict__.pop("grad_scale", None)
            optimizer.__dict__.pop("found_inf", None)
        if optimizer.overflow is not None:
            state["found_inf_per_device"] = {optimizer.overflow.device: optimizer.overflow}
        return result

    def _unscale_grads_(
        self, optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """torch's hook behind `unscale_`: multiply gradients by inv_scale; return each device's overflow flag."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        ranks = sharding.groups_of([*params, *grads], self.process_group)
        if any(g.is_sparse for g in grads):
            flags = super()._unscale_grads_(optimizer, inv_scale, found_inf, True)
        else:
            grads = [sharding.local(g) for g in grads]
            flags = {
                x.device: torch.zeros((), dtype=torch.float32, device=x.device) for x in (params if ranks else grads)
            }
            for device, flag in flags.items():
                unscale([g for g in grads if g.device == device], inv_scale.to(device), flag)
        return {device: sharding.all_reduce_max(flag, ranks) for device, flag in flags.items()}

    def skipped(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """1 if the optimizer's step since the last `update()` was skipped, else 0, on the device; None if disabled."""
        flags = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] if self._enabled else {}
        return _any(flags.values()) if flags else None

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Grow or back off the scale by what the steps saw, on the device; or set it to new_scale."""
        if not self._enabled or new_scale is not None or (self.hysteresis == 1 and self.min_scale == 0):
            return super().update(new_scale)
        scale, growth = self._check_scale_growth_tracker("update")
        flags = [
            f.to(scale.device)
            for state in self._per_optimizer_states.values()
            for f in state["found_inf_per_device"].values()
        ]
        if not flags:
            raise AssertionError("update() was called before step() or unscale_() of any optimizer")
        overflow = _any(flags) != 0
        forgiven = torch.full_like(growth, self.hysteresis) if self._forgiven is None else self._forgiven
        forgiven = forgiven - overflow.to(forgiven.dtype)
        back = overflow & (forgiven <= 0)
        good = torch.where(overflow, 0, growth + 1)
        grow = good >= self._growth_interval
        grown = scale * self._growth_factor
        smaller = scale * self._backoff_factor
        exhausted = (back & (smaller < self.min_scale)).float()
        self._exhausted = exhausted if self._exhausted is None else torch.maximum(self._exhausted, exhausted)
        scale.copy_(
            torch.where(back, smaller.clamp(min=self.min_scale), torch.where(grow & grown.isfinite(), grown, scale))
        )
        growth.copy_(torch.where(grow, 0, good))
        self._forgiven = torch.where(grow, self.hysteresis, forgiven)
        self._per_optimizer_states.clear()

    def check(self) -> None:
        """Raise FloatingPointError if the scale would have fallen below min_scale. Reads the device: call it to log."""
        if self._exhausted is not None and self._exhausted.item():
            raise FloatingPointError(
                f"the loss scale fell to its floor {self.min_scale:g}: gradients overflow whatever the scale; "
                "lower the learning rate, "
                "clip, keep what overflows in fp32, or train in bf16"
            )

    def state_dict(self) -> dict:
        """torch's, and how many overflows may still be forgiven where there is hysteresis."""
        own = {} if self._forgiven is None else {"hysteresis": int(self._forgiven.item())}
        return super().state_dict() | (own if self._enabled else {})

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "hysteresis"})
        if "hysteresis" in state_dict:
            self._forgiven = torch.full((), state_dict["hysteresis"], dtype=torch.int32, device=self._device)


def _any(flags: Iterable[Tensor]) -> Tensor:
    first, *others = (f.reshape(()) for f in flags)
    return torch.stack([first, *(f.to(first.device) for f in others)]).amax()


@functools.cache
def _attributes_of_all() -> frozenset[str]:
    """What torch gives every optimizer: by its constructor, and by schedules, which wrap `step` and note calls."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(())]))) | {"step", "_opt_called"}


def _can_be_put_back(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step changes only parameters, state and param_groups, and those hold only tensors and constants."""
    if not (type(optimizer).__module__.startswith("torch.optim.") or vars(optimizer).keys() <= _attributes_of_all()):
        return False
    return all(x is None or isinstance(x, HELD) for x in _leaves([list(optimizer.state.values()), _options(optimizer)]))


@torch.no_grad()
def _step_predicated(optimizer: torch.optim.Optimizer, found_inf: Tensor):
    """Step, and where found_inf is set have everything as it was."""
    before = _Snapshot(optimizer)
    with torch.enable_grad():
        result = optimizer.step()
    if before.in_place(found_inf.device):
        before.put_back_where(found_inf)
    elif found_inf.item():
        before.put_back()
    return result


class _Snapshot:
    """An optimizer's parameters, state and options before a step."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.states = {p: _containers(state) for p, state in optimizer.state.items()}
        self.options = _containers(_options(optimizer))
        self.leaves = self._leaves()
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        places = [sharding.local(x) for x in (*params, *self.leaves) if isinstance(x, Tensor)]
        self.copies = [(place, place.clone(), place._version) for place in places]

    def _leaves(self) -> list:
        return _leaves([list(self.optimizer.state.values()), _options(self.optimizer)])

    def in_place(self, device: torch.device) -> bool:
        """Whether the step wrote into tensors that were there, on this device, and nothing else."""
        now = self._leaves()
        same = len(now) == len(self.leaves) and all(x is y for x, y in zip(now, self.leaves, strict=True))
        return same and all(place.device == device or place._version == version for place, _, version in self.copies)

    def put_back_where(self, found_inf: Tensor) -> None:
        for place, copy, _ in self.copies:
            if place.device == found_inf.device:
                place.copy_(torch.where(found_inf != 0, copy, place))

    def put_back(self) -> None:
        for place, copy, _ in self.copies:
            place.copy_(copy)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.states)
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            params = group["params"]
            group.clear()
            group.update(options, params=params)


def _options(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _containers(tree: object):
    """A tree of new dicts, lists and tuples with the same leaves."""
    if type(tree) is dict:
        return {name: _containers(x) for name, x in tree.items()}
    return type(tree)(map(_containers, tree)) if type(tree) in (list, tuple) else tree


def _leaves(tree: object) -> list:
    if type(tree) is dict:
        tree = list(tree.values())
    return [leaf for x in tree for leaf in _leaves(x)] if type(tree) in (list, tuple) else [tree]

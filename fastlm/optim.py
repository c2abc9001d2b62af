"""Optimizers with unscaling, global-norm clipping, the overflow skip and the update in one trip over memory.

Each is a `torch.optim.Optimizer` that takes its torch namesake's arguments and state dict, and one more argument, `max_grad_norm`.
With it, or under a `GradScaler`, a step first reads the gradients once for their norm, then updates; a norm that is not
finite skips the step and leaves every bit as it was, the step count included. The host waits for nothing: `grad_norm` and
`overflow` are tensors on the parameters' device.

To add an optimizer: an op in fastlm/ops, and a class here that says what state a parameter has and which op to call.
"""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastlm.ops.adamw import adamw
from fastlm.ops.unscale import grad_stats

OPTIMIZERS: dict[str, type["Optimizer"]] = {}


class Optimizer(torch.optim.Optimizer):
    """What every optimizer of fastlm shares. Subclasses define STATES and `update`.

    max_grad_norm: clip the gradients' global norm over all groups to this; None for no clipping.
    grad_norm: the last step's norm before clipping, an fp32 scalar tensor; None if the step did not need it.
    overflow: 1 if the last step was skipped because a gradient was not finite, an fp32 scalar tensor; None if not looked at.
    """

    STATES: ClassVar[tuple[str, ...]] = ()  # names of fp32 state tensors shaped like the parameter
    _step_supports_amp_scaling = True  # torch's GradScaler hands grad_scale and found_inf over instead of unscaling

    def __init_subclass__(cls, name: str, **kwargs):
        super().__init_subclass__(**kwargs)
        OPTIMIZERS[name] = cls

    def __init__(self, params, defaults: dict, max_grad_norm: float | None = None):
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm

    @property
    def max_grad_norm(self) -> float | None:
        return self.defaults["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"max_grad_norm is {value}; give a positive norm, or None for no clipping")
        self.defaults["max_grad_norm"] = value  # in defaults, which copies and pickles keep; it is not a group's option

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [_checked_grad(p) for _, params in groups for p in params]
        self.grad_norm = self.overflow = None
        if grads:
            coefficient, self.overflow = self._coefficient(grads)
            for group, params in groups:
                if params:
                    self.update(group, params, [p.grad for p in params], coefficient, self.overflow)
        return loss

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor], coefficient: Tensor | None, found_inf: Tensor | None) -> None:
        """Apply this optimizer's op to one group."""
        raise NotImplementedError

    def _coefficient(self, grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """(factor that unscales and clips, overflow flag), each None when there is nothing to do.

        A scaler hands over grad_scale (what the loss was multiplied by) and, if it looked already, found_inf.
        """
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.max_grad_norm is None and (scale is None or found_inf is not None):
            return (None if scale is None else scale.reciprocal()), found_inf
        self.grad_norm, coefficient, overflow = grad_stats(grads, scale, self.max_grad_norm or 0.0).unbind()
        return coefficient, overflow if found_inf is None else torch.maximum(overflow, found_inf)

    def states(self, params: list[Tensor]) -> list[list[Tensor]]:
        """[steps, *one list for each of STATES], made of zeros at a parameter's first step."""
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in self.STATES:
                    self.state[p][name] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
        return [[self.state[p][name] for p in params] for name in ("step", *self.STATES)]

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict of this optimizer or of its torch namesake. States become fp32 on the parameter's device."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):  # torch casts states to the parameter's dtype, which loses bits in bf16
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, torch.float32, copy=True)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a namesake's groups lack the options that only we have
            for name, value in self.defaults.items():
                if name != "max_grad_norm":
                    group.setdefault(name, value)


class AdamW(Optimizer, name="adamw"):
    """AdamW (Loshchilov & Hutter 2019), as torch.optim.AdamW, whose state dict it reads and writes.

    lr may change between steps. bias_correction=False is the optimizer of Google's BERT. foreach, fused and capturable are
    accepted and change nothing: every step is one fused pass. Moments are fp32 whatever the parameters' dtype.
    Raises ValueError for values out of range and for amsgrad or differentiable, which are not served.
    """

    STATES = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        max_grad_norm: float | None = None,
    ):
        _check_range(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; each must lie in [0, 1)")
        if amsgrad or differentiable:
            raise ValueError("fastlm.optim.AdamW does not serve amsgrad or differentiable; torch.optim.AdamW does")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, bias_correction=bias_correction)
        super().__init__(params, defaults, max_grad_norm)

    def update(self, group, params, grads, coefficient, found_inf):
        steps, exp_avgs, exp_avg_sqs = self.states(params)
        if group.get("amsgrad"):
            raise ValueError("the loaded state dict has amsgrad=True, which fastlm.optim.AdamW does not serve; torch.optim.AdamW does")
        if group["maximize"]:
            coefficient = -torch.ones((), device=params[0].device) if coefficient is None else -coefficient
        scalars = _number(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"]
        adamw(params, grads, exp_avgs, exp_avg_sqs, steps, coefficient, found_inf, *scalars)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: tensors with two or more dimensions decay, vectors and scalars (norms, biases, slopes) do not.

    The rule of GPT-2's and GPT-3's reproductions; frozen parameters are left out.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def _checked_grad(p: Tensor) -> Tensor:
    if p.grad.is_sparse:
        raise ValueError(f"a parameter of shape {list(p.shape)} has a sparse gradient; build its Embedding with sparse=False, or use torch.optim.SparseAdam")
    if p.is_complex():
        raise ValueError(f"a parameter of shape {list(p.shape)} is complex; fastlm's optimizers take real ones (torch.view_as_real gives a view)")
    return p.grad


def _check_range(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")


def _number(lr: float | Tensor) -> float:
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        raise ValueError("lr is a tensor on the device, and reading it would stall the step; give a number or a CPU tensor")
    return float(lr)

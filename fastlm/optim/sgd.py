"""SGD with momentum, as torch.optim has it: so that "SGD does not train Transformers" can be seen with one word
changed.
"""

from collections.abc import Iterable

from torch import Tensor

from fastlm.ops.optim.sgd import SgdOptions, SgdUpdate, sgd
from fastlm.optim import checks
from fastlm.optim.base import Optimizer
from fastlm.optim.states import STATE_DTYPES, StateSpec


class SGD(Optimizer, name="sgd"):
    """SGD with momentum, as torch.optim.SGD, whose state dict it reads and writes.

    g ← g + weight_decay·θ;  m ← momentum·m + (1 - dampening)·g;  θ ← θ - lr·m, where m starts as the first g.

    Args:
        params: parameters or groups, as torch.optim takes them.
        lr: learning rate, a number or a CPU tensor of one element; it may change between steps. Default 1e-3.
        momentum: at least 0. Default 0: no momentum and no state for it.
        dampening: of gradients that enter the momentum after the first; finite. Default 0.
        weight_decay: an L2 penalty, added to the gradient; at least 0. Default 0.
        nesterov: Nesterov's momentum: the step is g + momentum·m; needs momentum > 0 and dampening = 0. Default False.
        maximize: ascend instead of descending. Default False.
        common: max_grad_norm, master, state_dtype, seed, process_group, fused: see `Optimizer`. foreach is accepted
            and changes nothing.

    Raises:
        ValueError: for values out of range, Nesterov without momentum, and differentiable, which is not served.
        TypeError: for an argument that is not known.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **common,
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        super().__init__(params, defaults, **common)

    def check(self, group):
        super().check(group)
        checks.at_least_zero(
            lr=checks.number(group["lr"]), momentum=group["momentum"], weight_decay=checks.plain(group["weight_decay"])
        )
        checks.flag(nesterov=group["nesterov"])
        if not checks.finite(group["dampening"]):
            raise ValueError(f"dampening is {group['dampening']!r}; give a finite number")
        if group["nesterov"] and not (group["momentum"] > 0 and group["dampening"] == 0):
            raise ValueError(
                f"nesterov takes momentum > 0 and dampening = 0; got momentum={group['momentum']}, "
                f"dampening={group['dampening']}"
            )

    def fixed(self, group):
        return super().fixed(group) | dict(wd_after_momentum=False)

    def state_specs(self, p, group):
        return {"momentum_buffer": StateSpec(p.shape, STATE_DTYPES[group["state_dtype"]])} if group["momentum"] else {}

    def _state(self, p, specs):
        """A buffer begins with a whole gradient, as torch's does: `step` counts from there where momentum is switched
        on later.
        """
        if "momentum_buffer" in specs and "momentum_buffer" not in self.state[p]:
            self.state[p].pop("step", None)
        return super()._state(p, specs)

    def update(self, group, part, coefficient, found_inf):
        params = part.params, part.masters, part.keys, part.grads
        options = SgdOptions(
            lr=checks.number(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
        )
        buffers = part.states.get("momentum_buffer", [])
        sgd(*SgdUpdate(*params, buffers, part.steps, coefficient, found_inf), *options)

    def translate(self, state_dict):
        """torch's SGD counts no steps, and a buffer that is there has seen at least one."""
        state = {i: {k: v for k, v in values.items() if v is not None} for i, values in state_dict["state"].items()}
        return state_dict | {"state": {i: {"step": 1.0, **values} if values else values for i, values in state.items()}}

"""Loss scaling for fp16 training, without the host waiting for the device.

`GradScaler` is torch's, with its interface and state dict, and two differences: a `fastlm.optim` optimizer does unscaling,
overflow check, clipping and update in its own pass, so `step` reads the gradients once instead of three times; and fp16
gradients are allowed. Dynamic scaling after Micikevicius et al. 2018.
"""

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fastlm.ops.unscale import unscale
from fastlm.optim import Optimizer


class GradScaler(torch.amp.GradScaler):
    """Drop-in for torch.amp.GradScaler. Other optimizers than fastlm's are stepped as torch does it, which waits for the
    device unless they are fused."""

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs):
        """Unscale, check and step; skips on overflow. Call `update()` after all optimizers have stepped."""
        if not self._enabled or not isinstance(optimizer, Optimizer):
            return super().step(optimizer, *args, **kwargs)
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update()")
        if state["stage"] is OptState.READY:
            optimizer.grad_scale = self._scale
        else:  # unscale_() was called, and looked
            optimizer.found_inf = torch.stack(list(state["found_inf_per_device"].values())).amax()
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            optimizer.__dict__.pop("grad_scale", None)
            optimizer.__dict__.pop("found_inf", None)
        if optimizer.overflow is not None:
            state["found_inf_per_device"] = {optimizer.overflow.device: optimizer.overflow}
        state["stage"] = OptState.STEPPED
        return result

    def _unscale_grads_(self, optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> dict[torch.device, Tensor]:
        """torch's hook behind `unscale_`: multiply every gradient by inv_scale, and return the overflow flag of each device."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(g.is_sparse for g in grads):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)
        flags = {g.device: torch.zeros((), dtype=torch.float32, device=g.device) for g in grads}
        for device, flag in flags.items():
            unscale([g for g in grads if g.device == device], inv_scale.to(device), flag)
        return flags

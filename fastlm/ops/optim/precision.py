"""A parameter of 16 bits and what completes it: fp32 masters, 16-bit remainders, or stochastic rounding.

Every optimizer's op reads a parameter as fp32 and writes fp32 back through this file; csrc/cpu/optim/parameter.h,
csrc/cuda/parameter.h and csrc/rules/philox.h are its C++ side.

    masters     fp32: the master copy is the parameter, wherever the model's own 16 bits are it, rounded to nearest
                int16: the 16 bits that a bf16 parameter lacks (remainders); both together are the parameter, exactly:
                4 bytes in all instead of 6
    keys        bf16 alone; what does not fit is rounded up or down by noise whose mean is right
    neither     the parameter's own bits, rounded to nearest

So what others write into the model's 16 bits (loading, averaging, tying) is the parameter from then on, however they
write it, and a master that is older is not.

The noise is Philox4x32-10 (Salmon et al. 2011), a pure function of (key, step, element), so a step can be repeated.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.backends.philox import LOW, philox

DRAWS = 8  # half-words in the four words of one counter


class Parameter(NamedTuple):
    stored: Tensor
    master: Tensor | None
    key: int | None

    def read(self) -> Tensor:
        """The parameter in fp32."""
        wide = self.stored.float()
        if self.master is None:
            return wide
        if self.master.dtype == torch.float32:
            return torch.where(self.master.to(self.stored.dtype) == self.stored, self.master, wide)
        joined = ((self.stored.view(torch.int16).int() << 16) + self.master.int()).view(torch.float32)
        return torch.where(joined.isnan(), wide, joined)  # 0 that others wrote, and a remainder below 0

    def write(self, value: Tensor, step: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(tensor, its new value) pairs that make the parameter `value` (fp32) at this step."""
        if self.key is not None:
            return [(self.stored, stochastic_round(value, self.key, step))]
        if self.master is None:
            return [(self.stored, value)]
        if self.master.dtype == torch.float32:
            return [(self.stored, value), (self.master, value)]
        return list(zip((self.stored, self.master), split(value), strict=True))


def parameters(update: Any) -> list[Parameter]:
    """The parameters of an update, each with its master or its key."""
    none = [None] * len(update.params)
    return [Parameter(*each) for each in zip(update.params, update.masters or none, update.keys or none, strict=True)]


def assign(pairs: list[tuple[Tensor, Tensor]], found_inf: Tensor | None) -> None:
    """Write each new value into its tensor, unless found_inf ≠ 0: then every bit stays."""
    for old, new in pairs:
        old.copy_(new if found_inf is None else torch.where(found_inf != 0, old.to(new.dtype), new))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as bf16, rounded half away from zero, and the signed 16 bits that are left. A NaN becomes the usual one."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int16)
    return ((bits - low.int()) >> 16).to(torch.int16).view(torch.bfloat16), low


def stochastic_round(x: Tensor, key: int, step: Tensor) -> Tensor:
    """x (fp32) as bf16, up or down at random with mean x. Element e, in row-major order, takes half-word e mod 8 of
    counter (e / 8, step).
    """
    eighth = torch.arange(-(-x.numel() // DRAWS), device=x.device)
    words = torch.stack(philox((eighth & LOW, eighth >> 32, step.long(), torch.zeros_like(eighth)), key), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[: x.numel()].view(x.shape)
    up = x.view(torch.int32) + halves.int() >> 16
    return torch.where(x.isnan(), torch.nan, up.to(torch.int16).view(torch.bfloat16))

"""A parameter of 16 bits and what completes it: fp32 masters, 16-bit remainders, or rounding by noise.

Every optimizer's op reads a parameter as fp32 and writes fp32 back through this file; csrc/cpu/optim/parameter.h and
csrc/rules/philox.h are its C++ side.

    companion fp32    the master copy is the parameter, wherever the model's own 16 bits are it, rounded to nearest
    companion int16   bf16 and the remainder are the parameter, exactly: 4 bytes in all instead of a master's 6
    key               bf16 alone; what does not fit is rounded up or down by noise whose mean is right
    neither           the parameter's own bits, rounded to nearest

So what others write into the model's 16 bits (loading, averaging, tying) is the parameter from then on, however they
write it, and a master that is older is not.

The noise is Philox4x32-10 (Salmon et al. 2011), a pure function of (key, step, element), so a step can be repeated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends.philox import LOW, philox

DRAWS = 8  # half-words in the four words of one counter


class Parameter(NamedTuple):
    stored: Tensor
    companion: Tensor | None
    key: int | None

    def read(self) -> Tensor:
        """The parameter in fp32."""
        wide = self.stored.float()
        if self.companion is None:
            return wide
        if self.companion.dtype == torch.float32:
            return torch.where(self.companion.to(self.stored.dtype) == self.stored, self.companion, wide)
        joined = ((self.stored.view(torch.int16).int() << 16) + self.companion.int()).view(torch.float32)
        return torch.where(joined.isnan(), wide, joined)  # 0 that others wrote, and a remainder below 0

    def write(self, value: Tensor, step: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(tensor, its new value) pairs that make the parameter `value` (fp32) at this step."""
        if self.key is not None:
            return [(self.stored, round_by_noise(value, self.key, step))]
        if self.companion is None:
            return [(self.stored, value)]
        if self.companion.dtype == torch.float32:
            return [(self.stored, value), (self.companion, value)]
        return list(zip((self.stored, self.companion), split(value), strict=True))


def parameters(params: list[Tensor], companions: list[Tensor], keys: list[int]) -> list[Parameter]:
    """companions, keys: empty, or one for each parameter."""
    none = [None] * len(params)
    return [Parameter(*each) for each in zip(params, companions or none, keys or none, strict=True)]


def assign(pairs: list[tuple[Tensor, Tensor]], found_inf: Tensor | None) -> None:
    """Write each new value into its tensor, unless found_inf ≠ 0: then every bit stays."""
    for old, new in pairs:
        old.copy_(new if found_inf is None else torch.where(found_inf != 0, old.to(new.dtype), new))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as bf16, rounded half away from zero, and the signed 16 bits that are left. A NaN becomes the usual one."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int16)
    return ((bits - low.int()) >> 16).to(torch.int16).view(torch.bfloat16), low


def round_by_noise(x: Tensor, key: int, step: Tensor) -> Tensor:
    """x (fp32) as bf16, up or down at random with mean x. Element e, in row-major order, takes half-word e mod 8 of
    counter (e / 8, step).
    """
    eighth = torch.arange(-(-x.numel() // DRAWS), device=x.device)
    words = torch.stack(philox((eighth & LOW, eighth >> 32, step.long(), torch.zeros_like(eighth)), key), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[: x.numel()].view(x.shape)
    up = x.view(torch.int32) + halves.int() >> 16
    return torch.where(x.isnan(), torch.nan, up.to(torch.int16).view(torch.bfloat16))

"""What is kept for a parameter: its states, their shapes and dtypes, and what completes a parameter of 16 bits.

`master` says where a 16-bit parameter keeps what its 16 bits cannot hold:

    None           nowhere; updates are rounded to nearest
    "fp32"         in a master copy
    "remainder"    (bf16) in 16 more bits, exactly
    "stochastic"   (bf16) nowhere; updates are rounded up or down at random, right on average, by noise drawn from
                   (seed, step, parameter, element)

fp32 parameters need none and ignore it. Whatever else writes into a 16-bit parameter (loading, averaging, tying), its
value is the parameter from then on: a master copy counts only while it rounds to the parameter, and a remainder refines
whatever is there, by half a unit in its last place at most. To write more than 16 bits, write
optimizer.state[p]["master"] too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.optim import sharding

MASTERS = (None, "fp32", "remainder", "stochastic")
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# a master's name in the state, and its dtype
MASTER_STATES = {"fp32": ("master", torch.float32), "remainder": ("remainder", torch.int16)}
MASTERED = {name for name, _ in MASTER_STATES.values()}


class StateSpec(NamedTuple):
    """What a tensor of a parameter's state looks like. lost: the parameter's dimension that it is an average over."""

    shape: torch.Size
    dtype: torch.dtype
    lost: int | None = None


StateSpecs = dict[str, StateSpec]


def master_of(p: Tensor, group: dict) -> str | None:
    """The group's `master`, where the parameter needs one."""
    return None if p.dtype not in (torch.bfloat16, torch.float16) else group["master"]


def moments_specs(p: Tensor, group: dict) -> StateSpecs:
    """exp_avg and exp_avg_sq, shaped like the parameter: Adam's family."""
    spec = StateSpec(p.shape, STATE_DTYPES[group["state_dtype"]])
    return {"exp_avg": spec, "exp_avg_sq": spec}


def zeros(p: Tensor, spec: StateSpec) -> Tensor:
    """Zeros in the parameter's memory order and on its mesh, where they have anything of its shape."""
    if spec.lost is not None:
        return sharding.zeros(p, *spec)
    if spec.shape == p.shape:
        return torch.zeros_like(p, dtype=spec.dtype, memory_format=torch.preserve_format)
    return torch.zeros(spec.shape, dtype=spec.dtype, device=p.device)

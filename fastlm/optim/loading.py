"""State dicts into states: of an optimizer of fastlm or of its namesake in torch, apex or Hugging Face, whole or in
shards."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.optim import sharding

OF_ALL_GROUPS = ("max_grad_norm", "seed")  # an optimizer's defaults that are no group's options


class Kept(NamedTuple):
    """A tensor of a parameter's state. lost: the parameter's dimension that it is an average over."""

    shape: torch.Size
    dtype: torch.dtype
    lost: int | None = None


def counted_by_parameter(state_dict: dict) -> dict:
    """apex counts steps in each group, and we at each parameter."""
    state = dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        if "step" in group:
            state |= {i: {"step": group["step"], **state[i]} for i in group["params"] if i in state}
    return {**state_dict, "state": state}


def merged(here: list[dict], saved: list[dict]) -> list[dict]:
    """Groups of the parameters that are here, with the saved options; a namesake lacks some of ours, which stay as they
    are."""
    sizes = [[len(group["params"]) for group in groups] for groups in (here, saved)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the saved groups have {sizes[1]} parameters and this optimizer's {sizes[0]}; build it with the groups that were saved"
        )
    foreign = ("params", "step", *OF_ALL_GROUPS)
    options = [{name: copy.deepcopy(value) for name, value in group.items() if name not in foreign} for group in saved]
    return [{**group, **theirs} for group, theirs in zip(here, options, strict=True)]


def loaded(value: Tensor, p: Tensor, kept: Kept) -> Tensor:
    """A copy of a saved state, laid out as it is kept here. Dimensions of size 1 may differ: torch keeps them in
    factors."""
    out, value = zeros(p, kept), value.detach()
    if value.shape != out.shape:
        if [size for size in value.shape if size != 1] != [size for size in out.shape if size != 1]:
            raise ValueError(
                f"a saved state has shape {list(value.shape)}, and a parameter of shape {list(p.shape)} needs {list(out.shape)} here"
            )
        value = value.reshape(out.shape)
    return out.copy_(sharding.placed_as(value, out))


def zeros(p: Tensor, kept: Kept) -> Tensor:
    """Zeros in the parameter's memory order and on its mesh, where they have anything of its shape."""
    if kept.lost is not None:
        return sharding.zeros(p, *kept)
    if kept.shape == p.shape:
        return torch.zeros_like(p, dtype=kept.dtype, memory_format=torch.preserve_format)
    return torch.zeros(kept.shape, dtype=kept.dtype, device=p.device)

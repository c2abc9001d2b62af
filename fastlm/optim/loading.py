"""State dicts into states: of an optimizer of fastlm or of its namesake in torch, apex or Hugging Face, whole or in
shards.
"""

import copy
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.optim import namesakes, sharding
from fastlm.optim.states import MASTERED, StateSpec, StateSpecs, zeros

OF_ALL_GROUPS = ("max_grad_norm", "seed")  # an optimizer's defaults that are no group's options


def counted_by_parameter(state_dict: dict) -> dict:
    """apex counts steps in each group, and we at each parameter."""
    state = dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        if "step" in group:
            state |= {i: {"step": group["step"], **state[i]} for i in group["params"] if i in state}
    return {**state_dict, "state": state}


def merged(here: list[dict], saved: list[dict]) -> list[dict]:
    """Groups of the parameters that are here, with the saved options; a namesake lacks some of ours, which stay as they
    are.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (here, saved)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the saved groups have {sizes[1]} parameters and this optimizer's {sizes[0]}; "
            "build it with the groups that were saved"
        )
    foreign = ("params", "step", *OF_ALL_GROUPS)
    options = [{name: copy.deepcopy(value) for name, value in group.items() if name not in foreign} for group in saved]
    return [{**group, **theirs} for group, theirs in zip(here, options, strict=True)]


def states(
    state_dict: dict, groups: list[dict], specs_of: Callable[[Tensor, dict], StateSpecs], name: str
) -> defaultdict:
    """The saved states of the parameters in groups, as specs_of(p, group) has them here; torch would cast them to the
    parameter's dtype, which loses bits in bf16. Raises ValueError if one is another's than that of the class `name`.
    """
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    owners = [(p, group) for group in groups for p in group["params"]]
    made = defaultdict(dict)
    for i, (p, group) in zip(saved, owners, strict=True):
        values, specs = state_dict["state"].get(i, {}), specs_of(p, group)
        namesakes.check_state(name, values, [each for each in specs if each not in MASTERED])
        if values:
            made[p] = {each: loaded(torch.as_tensor(values[each]), p, specs[each]) for each in specs if each in values}
    return made


def loaded(value: Tensor, p: Tensor, spec: StateSpec) -> Tensor:
    """A copy of a saved state, laid out as it is here."""
    out, value = zeros(p, spec), value.detach()
    if value.numel() == out.numel() == 1:  # apex's counts have a dimension
        value = value.reshape(out.shape)
    if value.shape != out.shape:
        raise ValueError(
            f"a saved state has shape {list(value.shape)}, and a parameter of shape {list(p.shape)} needs "
            f"{list(out.shape)} here"
        )
    return out.copy_(sharding.placed_as(value, out))

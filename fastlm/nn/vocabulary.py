"""Tables of which each rank holds a part of the words: DTensors, divided by rows over one dimension of a mesh, as
Megatron-LM divides embeddings and their loss (Shoeybi et al. 2019). Every rank of the mesh is given the same ids,
states and labels, and gets the same result; the table's gradient stays divided.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops import ranks
from fastlm.optim.sharding import is_dtensor


class Part(NamedTuple):
    """What of a table lies here: `weight` and bias of the words first, first + 1, … of `words`; the name of the process
    group whose ranks hold the others, "" where all is here.
    """

    weight: Tensor
    bias: Tensor | None
    first: int
    words: int
    group: str


def part(weight: Tensor, bias: Tensor | None = None) -> Part:
    """Of weight [V, D] and bias [V]. Raises ValueError for tables that are divided otherwise."""
    words = len(weight)
    if not is_dtensor(weight):
        if bias is not None and is_dtensor(bias):
            raise ValueError("bias is a DTensor and weight is none; give bias.full_tensor()")
        return Part(weight, bias, 0, words, "")
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.get_coordinate() is None:
        raise ValueError(f"weight lies on {mesh}, which this rank is no part of")
    cuts = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cuts) > 1 or not all(placements[i].is_shard(0) and not hasattr(placements[i], "split_factor") for i in cuts):
        raise ValueError(
            f"weight lies as {placements}; give it divided by rows over one mesh dimension, as Shard(0), and Replicate "
            "over the others, or weight.full_tensor()"
        )
    if bias is not None and not (is_dtensor(bias) and (bias.device_mesh, bias.placements) == (mesh, placements)):
        lies = f"lies as {bias.placements}" if is_dtensor(bias) else "is no DTensor"
        raise ValueError(f"bias {lies} and weight as {placements}; give both divided alike, on one mesh")
    group, first = "", 0
    if cuts and (size := mesh.size(cuts[0])) > 1:
        share = -(-words // size)
        if share * (size - 1) >= words:
            raise ValueError(f"{words} words over {size} ranks leave some without any; divide them over fewer")
        group, first = mesh.get_group(cuts[0]).group_name, share * mesh.get_local_rank(cuts[0])
    return Part(weight.to_local(), None if bias is None else bias.to_local(), first, words, group)


def whole(weight: Tensor, **given: Tensor) -> Tensor:
    """What of a tensor, given by its name, lies here: all of it. ValueError for one that is divided."""
    ((name, x),) = given.items()
    if not is_dtensor(x):
        return x
    if not is_dtensor(weight) or x.device_mesh != weight.device_mesh:
        raise ValueError(f"{name} is a DTensor, and weight is none on its mesh; give {name}.full_tensor()")
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"{name} lies as {x.placements}, and every rank must hold all of it; redistribute it to Replicate, or, if "
            f"each rank has rows and a weight of its own, give {name}.to_local()"
        )
    return x.to_local()


def like(given: Tensor, made: Tensor) -> Tensor:
    """What each rank made alike, as a DTensor if that was given."""
    if not is_dtensor(given):
        return made
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(made, given.device_mesh, given.placements, run_check=False)


class AddedUp(torch.autograd.Function):
    """x summed over the ranks of a group, of which one alone has other numbers than 0, so that no sum is rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        return ranks.added_up(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None

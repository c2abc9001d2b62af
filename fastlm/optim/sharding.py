"""Parameters that are DTensors: FSDP2's, tensor-parallel ones, and both at once, evenly divided or not.

A step works on the part of each parameter that lies on this rank, and its state is divided as the parameter is, so that
state dicts and torch.distributed.checkpoint see DTensors. Rules of single elements need nothing else, and run on the
same backends as ever. Sums over whole tensors (the global norm, LAMB's norms, Adafactor's means) are added up over the
mesh dimensions that divide a tensor and no other, so copies do not count twice; a step needs one or a few collectives
for each mesh dimension, whatever the number of tensors. Every rank of a mesh must step the same parameters, as FSDP and
tensor parallelism do.

DTensors are known by their attributes: torch.distributed.tensor takes a second to import, and whoever has one has
imported it. LAMB and Adafactor on shards run their definition, in PyTorch: their native kernels take both passes in one
call.
"""

from collections.abc import Iterable
from itertools import accumulate, groupby
from math import prod

import torch
from torch import Tensor

from fastlm.backends.dispatch import REFERENCE, BackendError, Op, forced_backend
from fastlm.ops.optim.sums import Shards, UpdateRule, all_reduce_sums, run_rules
from fastlm.ops.optim.unscale import grad_stats

PLAIN = (Tensor, torch.nn.Parameter)
# elements of this rank whose updates may wait for sums at once; each holds some 16 bytes meanwhile
SIDE_BY_SIDE = 2**24


def is_dtensor(x: Tensor) -> bool:
    return type(x) not in PLAIN and hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """What of x lies on this rank: its own memory, not a copy."""
    return x.to_local() if is_dtensor(x) else x


def local_grad(p: Tensor) -> Tensor:
    """What of p's gradient belongs to what of p lies on this rank."""
    g = p.grad
    if not is_dtensor(g):
        return g
    if g.placements != p.placements:  # tensor parallelism leaves gradients of replicas to be summed
        g = g.redistribute(placements=p.placements)
    return g.to_local()


def shards(p: Tensor) -> Shards:
    """How p is divided: its dimension and the process group, for every mesh dimension that divides it."""
    if not is_dtensor(p):
        return ()
    mesh = p.device_mesh
    return tuple(
        (placement.dim, mesh.get_group(i))
        for i, placement in enumerate(p.placements)
        if divides(placement) and mesh.size(i) > 1
    )


def divides(placement) -> bool:
    return hasattr(placement, "dim")  # Shard, and the strided form that FSDP2 puts on top of tensor parallelism


def shard_number(p: Tensor) -> int:
    """A number that this rank's part of p shares with its copies alone."""
    number = 0
    if is_dtensor(p):
        for i, placement in enumerate(p.placements):
            number = number * p.device_mesh.size(i) + (p.device_mesh.get_local_rank(i) if divides(placement) else 0)
    return number


def check(p: Tensor) -> None:
    """Raise ValueError for a DTensor that no step can be right for."""
    if not is_dtensor(p):
        return
    if p.device_mesh.get_coordinate() is None:
        where = f"a parameter of shape {list(p.shape)} lies on {p.device_mesh}"
        raise ValueError(f"{where}, which this rank is no part of; give each rank's optimizer its own parameters")
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"a parameter of shape {list(p.shape)} is a sum not yet taken, {p.placements}; "
            "redistribute it to Shard or Replicate"
        )


# ---------------------------------------------------------------------------------------------------------------------
# State


def zeros(p: Tensor, shape: torch.Size, dtype: torch.dtype, lost: int) -> Tensor:
    """Zeros of p's shape without the dimension `lost`, or with 1 there, as `shape` has it; divided as p is, and copies
    on the ranks that divide `lost`.
    """
    if not is_dtensor(p):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    from torch.distributed.tensor import DTensor

    here, keeps = local(p), len(shape) == p.ndim
    sizes = [1 if dim == lost else size for dim, size in enumerate(here.shape) if keeps or dim != lost]
    part = torch.zeros(sizes, dtype=dtype, device=here.device)
    placements = [_averaged(placement, lost, keeps) for placement in p.placements]
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(part, p.device_mesh, placements, run_check=False, shape=shape, stride=whole.stride())


def _averaged(placement, lost: int, keeps: bool):
    """A parameter's placement for its average over the dimension `lost`, which is of size 1 (keeps) or gone."""
    from torch.distributed.tensor import Replicate

    if divides(placement) and placement.dim == lost:
        return Replicate()
    if keeps or not divides(placement) or placement.dim < lost:
        return placement
    options = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim - 1, **options)


def placed_as(value: Tensor, like: Tensor) -> Tensor:
    """A saved value divided as `like` is, whichever way it was divided when saved."""
    if is_dtensor(value) and is_dtensor(like) and value.device_mesh == like.device_mesh:
        return value.redistribute(placements=like.placements)
    whole = value.full_tensor() if is_dtensor(value) else value
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def groups_of(tensors: Iterable[Tensor], others=None) -> tuple:
    """The process groups whose ranks hold different parts of any of the tensors, and `others` if given."""
    divided = (
        (x.device_mesh, i)
        for x in tensors
        if is_dtensor(x)
        for i, placement in enumerate(x.placements)
        if not placement.is_replicate()
    )
    found = dict.fromkeys(mesh.get_group(i) for mesh, i in divided if mesh.size(i) > 1)
    return (*found, *([others] if others is not None else []))


def norms(params: list[Tensor], pairs: list[tuple[Tensor, Tensor]], others=None) -> Tensor:
    """The global norms of the gradients, fp32, one for each way in which parameters are divided: their norm is the norm
    of all.

    pairs: parameters and gradients. Parameters without a gradient count as zeros, so a rank that has none still takes
    its part in the sums. others: a process group whose ranks have other parameters. Several devices are added up on the
    first parameter's.
    """
    kinds: dict[tuple, list[Tensor]] = {_divided_among(p): [] for p in params}
    for p, grad in pairs:
        kinds[_divided_among(p)].append(grad)
    squares = [_square(members, params[0].device) for members in kinds.values()]
    extra = () if others is None else (others,)
    return torch.stack(all_reduce_sums(squares, [each + extra for each in kinds])).sqrt().float()


def _divided_among(p: Tensor) -> tuple:
    return tuple(group for _, group in shards(p))


def _square(grads: list[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of gradients on any devices, fp64 on this one."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        by_device.setdefault(g.device, []).append(g)
    each = (grad_stats(members, None, 0.0)[0].double().square().to(device) for members in by_device.values())
    return sum(each, start=torch.zeros((), dtype=torch.float64, device=device))


def all_reduce_max(flag: Tensor, groups: tuple) -> Tensor:
    """1 if the flag is set on any rank of the groups, else 0."""
    whole = flag.full_tensor() if is_dtensor(flag) else flag
    return all_reduce_sums([whole.reshape(())], [groups])[0].clamp(max=1.0) if groups else whole


def apply(op: Op, rules: list[UpdateRule], shapes: list[torch.Size], divisions: list[Shards]) -> None:
    """The op on shards of tensors of these shapes, by its rules, with sums over ranks in between."""
    forced = forced_backend(op.name)
    if forced not in (None, REFERENCE):
        raise BackendError(
            f"{op.name}: backend {forced!r} cannot serve shards, whose sums cross ranks within the update; "
            "leave the choice free"
        )
    sizes = [
        shape.numel() // prod(group.size() for _, group in division)
        for shape, division in zip(shapes, divisions, strict=True)
    ]
    ends = list(accumulate(sizes))  # of whole shapes, so that every rank makes the same rounds
    for _, members in groupby(range(len(rules)), key=lambda i: ends[i] // SIDE_BY_SIDE):
        chosen = list(members)
        run_rules([rules[i] for i in chosen], [divisions[i] for i in chosen])

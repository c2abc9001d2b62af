"""Optimizers on tensors that are divided by hand: on shards, replicas and meshes they step as on whole tensors."""

import pytest
import torch
import torch.distributed as dist
from formulas import CHOICES, KINDS
from sharded import EXACT, INDICES, assert_same, make, mesh_of, on, pairs
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastlm
from fastlm import optim
from fastlm.ops.optim.precision import Parameter


def steps_equal(rank, world, placements, choices, options, mesh_shape=None):
    mesh = mesh_of(*mesh_shape or (world,))
    for i in choices:
        whole, divided, new_grads = pairs(mesh, placements)
        a, b = make(CHOICES[i], whole, **options), make(CHOICES[i], divided, **options)
        for step in range(4):
            new_grads()
            if step == 2:
                whole[0].grad = divided[0].grad = None
            a.step(), b.step()
            if a.grad_norm is not None:
                torch.testing.assert_close(b.grad_norm, a.grad_norm, **EXACT)
        assert_same(whole, divided, a, b)


@on(2, 3)
def test_every_variant_on_shards_of_rows(ranks):
    ranks.run(steps_equal, (Shard(0),), range(len(CHOICES)), dict(max_grad_norm=1.0))


@on(3)
@pytest.mark.parametrize("dim, choices", [(1, range(len(CHOICES))), (2, INDICES)], ids=["1", "2"])
def test_shards_of_columns(ranks, dim, choices):
    """The third dimension is one tensor's alone; the other shapes are cut as by the second."""
    ranks.run(steps_equal, (Shard(dim),), choices, dict(max_grad_norm=1.0))


@on(2)
def test_every_variant_on_replicas(ranks):
    ranks.run(steps_equal, (Replicate(),), range(len(CHOICES)), dict(max_grad_norm=1.0))


@on(4)
@pytest.mark.parametrize(
    "placements",
    [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(2), Replicate())],
    ids=str,
)
def test_every_optimizer_on_a_mesh_of_two_dimensions(ranks, placements):
    ranks.run(steps_equal, placements, INDICES, dict(max_grad_norm=1.0), (2, 2))


def precisions_equal(rank, world):
    mesh = mesh_of(world)
    for choice in KINDS:
        for options in (dict(master="fp32"), dict(master="remainder"), dict(), dict(state_dtype="bf16")):
            dtype = torch.float32 if "state_dtype" in options else torch.bfloat16
            whole, divided, new_grads = pairs(mesh, (Shard(0),), dtype=dtype)
            a, b = make(choice, whole, **options), make(choice, divided, **options)
            for _ in range(3):
                new_grads(), a.step(), b.step()
            name = {"fp32": "master", "remainder": "remainder"}.get(options.get("master"))
            if name is None:  # a state that is rounded may fall to the other side
                assert_same(whole, divided, a, b, rtol=2**-7, atol=1e-3)
            else:
                for p, q in zip(whole, divided, strict=True):
                    exact = Parameter(p.detach(), a.state[p][name], None).read()
                    here = Parameter(q.to_local().detach(), b.state[q][name].to_local(), None).read()
                    torch.testing.assert_close(here, distribute_tensor(exact, mesh, q.placements).to_local(), **EXACT)


@on(2)
def test_masters_remainders_and_bf16_states_on_shards(ranks):
    ranks.run(precisions_equal)


def shards_draw_their_own_noise(rank, world):
    p = nn.Parameter(distribute_tensor(torch.ones(2 * 512, dtype=torch.bfloat16), mesh_of(world), [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(2 * 512, dtype=torch.bfloat16), mesh_of(world), [Shard(0)])
    optim.SGD([p], lr=2.0**-10, master="stochastic").step()
    first, second = p.full_tensor().chunk(2)
    assert 0.05 < (first != 1).float().mean() < 0.5 and not torch.equal(first, second)


@on(2)
def test_shards_draw_their_own_noise(ranks):
    ranks.run(shards_draw_their_own_noise)


def odd_cases(rank, world):
    mesh = mesh_of(world)
    whole, divided, new_grads = pairs(mesh, (Shard(0),), shapes=((5, 3), (4, 2), (3,)))
    plain = nn.Parameter(divided[1].full_tensor())  # beside DTensors, a tensor counts as a replica
    mixed = [divided[0], plain, divided[2]]
    other = mesh_of(1, world)["model"]  # the same ranks, another mesh
    elsewhere = nn.Parameter(distribute_tensor(whole[2].detach().clone(), other, [Shard(0)]))
    mixed[2] = elsewhere
    a, b = optim.LAMB(whole, max_grad_norm=0.5), optim.LAMB(mixed, max_grad_norm=0.5)
    for _ in range(3):
        new_grads()
        plain.grad = whole[1].grad.clone()
        elsewhere.grad = distribute_tensor(whole[2].grad.clone(), other, [Shard(0)])
        a.step(), b.step()
        torch.testing.assert_close(b.grad_norm, a.grad_norm, **EXACT)
    assert_same(whole, mixed, a, b)
    new_grads()  # a gradient that is still a sum over ranks
    replica = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    replica.grad = DTensor.from_local(torch.full((3,), rank + 1.0), mesh, [Partial()])
    optim.SGD([replica], lr=1.0).step()
    torch.testing.assert_close(replica.full_tensor(), torch.full((3,), 1.0 - world * (world + 1) / 2))
    with pytest.raises(ValueError, match="a sum not yet taken"):
        optim.SGD([nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))])
    with (
        pytest.raises(fastlm.backends.dispatch.BackendError, match="cannot serve shards"),
        fastlm.use_backend(lamb="cpp"),
    ):
        b.step()


@on(2, 3)
def test_several_meshes_plain_tensors_and_what_is_refused(ranks):
    ranks.run(odd_cases)


def a_mesh_without_this_rank(rank, world):
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    if rank < 2:
        optim.AdamW([p])
        return
    with pytest.raises(ValueError, match="which this rank is no part of"):
        optim.AdamW([p])


@on(3)
def test_a_mesh_without_this_rank_is_refused(ranks):
    ranks.run(a_mesh_without_this_rank)


def rounds_equal(rank, world):
    optim.sharding.SIDE_BY_SIDE = 8
    steps_equal(rank, world, (Shard(0),), INDICES, {})
    optim.sharding.SIDE_BY_SIDE = 2**24


@on(2)
def test_many_rounds_of_sums(ranks):
    ranks.run(rounds_equal)

"""Checkpoints of sharded models, through files and state dicts, to other numbers of ranks and back."""

import copy
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as checkpoints
from formulas import CHOICES, KINDS
from sharded import Model, assert_same, fsdp, full, make, mesh_of, on, pairs, train
from torch.distributed.tensor import Shard

from fastlm import optim

PRECISIONS = ({}, dict(master="remainder"), dict(master="fp32"))
ONE_EACH = list({choice.optimizer: i for i, choice in enumerate(CHOICES)}.values())


def saved_and_loaded(rank, world, folder, choices):
    """Steps, a checkpoint, another model and optimizer that load it, and more steps: the bits of going on without
    one.
    """
    for i in choices:
        for options in PRECISIONS:
            build = partial(new_training, CHOICES[i], options, world)
            one, other = build(), build()
            train(*one, rank, world, range(3))
            for p in one[0].parameters():  # torch's helpers want a state for every parameter
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            one[1].step(), one[1].zero_grad()
            through_a_file(one, other, f"{folder}/{i}{options}")
            assert_same_bits(*one, *other)
            train(*one, rank, world, range(3, 5)), train(*other, rank, world, range(3, 5))
            assert_same_bits(*one, *other)
            if options != PRECISIONS[1]:  # neither gloo nor NCCL carries int16, so remainders are saved in shards alone
                whole_on_the_first_rank(one, new_training(CHOICES[i], options, 1), rank)


def new_training(choice, options, world):
    model = (fsdp(mesh_of(world)) if world > 1 else Model()).to(torch.bfloat16 if options else torch.float32)
    return model, make(choice, model.parameters(), max_grad_norm=1.0, **options)


def through_a_file(saved, loaded, path):
    weights, states = checkpoints.get_state_dict(*saved)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
    weights, states = checkpoints.get_state_dict(*loaded)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    checkpoints.set_state_dict(*loaded, model_state_dict=weights, optim_state_dict=states)


def whole_on_the_first_rank(sharded, single, rank):
    """The sharded optimizer's state gathered, and loaded by one that is not."""
    options = checkpoints.StateDictOptions(full_state_dict=True)
    whole = checkpoints.get_optimizer_state_dict(*sharded, options=options)
    if rank == 0:
        checkpoints.set_optimizer_state_dict(*single, whole, options=options)
    for p, q in zip(sharded[0].parameters(), single[0].parameters(), strict=True):
        for name, value in sharded[1].state[p].items():
            value = full(value)
            assert rank or torch.equal(single[1].state[q][name], value)


def assert_same_bits(model, optimizer, again, other):
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for x, y in [(p, q), *((value, other.state[q][name]) for name, value in optimizer.state[p].items())]:
            assert (
                type(x) is type(y)
                and x.dtype == y.dtype
                and torch.equal(optim.sharding.local(x), optim.sharding.local(y))
            )


@on(2)
def test_distributed_checkpoint(ranks, tmp_path):
    ranks.run(saved_and_loaded, str(tmp_path), ONE_EACH)


def test_distributed_checkpoint_of_one_process(tmp_path):
    saved_and_loaded(0, 1, str(tmp_path), ONE_EACH[-2:])


def a_whole_state_dict_loads_into_shards(rank, world):
    mesh = mesh_of(world)
    for choice in KINDS:
        whole, divided, new_grads = pairs(mesh, (Shard(0),))
        a, b = make(choice, whole), make(choice, divided)
        new_grads(), a.step(), b.step()
        again, back = make(choice, divided), make(choice, whole)
        again.load_state_dict(copy.deepcopy(a.state_dict())), back.load_state_dict(b.state_dict())
        new_grads(), back.step(), again.step()
        assert_same(whole, divided, back, again)


@on(2, 3)
def test_state_dicts_load_from_whole_to_shards_and_back(ranks):
    ranks.run(a_whole_state_dict_loads_into_shards)

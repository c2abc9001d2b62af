"""Sharded training gives what one process gives: every optimizer, clipping and loss scaling on DTensors, FSDP2, tensor
parallelism, DDP and ZeRO.
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as checkpoints
from formulas import CHOICES, KINDS
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastlm
from fastlm import optim
from fastlm.amp import GradScaler
from fastlm.models import ModelConfig, Transformer
from fastlm.ops.precision import Parameter
from fastlm.positions import SCHEMES, ALiBi, alibi_slopes

SHAPES = ((7, 5), (4,), (), (3, 6, 4), (1, 9), (0, 3))  # uneven everywhere; some ranks get nothing of some
EXACT = dict(rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def ranks(request):
    ranks = Ranks(request.param)
    yield ranks
    ranks.stop()


def on(*worlds):
    return pytest.mark.parametrize("ranks", worlds, indirect=True, ids=lambda world: f"{world}_ranks")


def mesh_of(*shape, names=("data", "model")):
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names[: len(shape)])


def make(choice, params, **more):
    return optim.OPTIMIZERS[choice.optimizer](params, **choice.options, **more)


def pairs(mesh, placements, shapes=SHAPES, dtype=torch.float32, seed=0):
    """Parameters whole and the same as DTensors, and a function that gives both the same new gradients."""
    g = torch.Generator().manual_seed(seed)
    whole = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    legal = lambda p: [
        Shard(min(each.dim, p.ndim - 1)) if isinstance(each, Shard) and p.ndim else Replicate() for each in placements
    ]
    divided = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, legal(p))) for p in whole]

    def new_grads(scale=1.0):
        for p, q in zip(whole, divided, strict=True):
            p.grad = (scale * torch.randn(p.shape, generator=g)).to(dtype)
            q.grad = distribute_tensor(p.grad.clone(), mesh, q.placements)

    return whole, divided, new_grads


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same(whole, divided, a, b, **tolerance):
    """Parameters, and every tensor of the optimizers' states."""
    for p, q in zip(whole, divided, strict=True):
        torch.testing.assert_close(full(q.detach()), p.detach(), **tolerance or EXACT)
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            torch.testing.assert_close(full(b.state[q][name]), value, **tolerance or EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors divided by hand


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
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_variant_on_shards(ranks, dim):
    ranks.run(steps_equal, (Shard(dim),), range(len(CHOICES)), dict(max_grad_norm=1.0))


@on(2)
def test_every_variant_on_replicas(ranks):
    ranks.run(steps_equal, (Replicate(),), range(len(CHOICES)), dict(max_grad_norm=1.0))


INDICES = sorted({CHOICES.index(c) for c in KINDS})


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


# ---------------------------------------------------------------------------------------------------------------------
# Models under FSDP2, tensor parallelism, DDP and ZeRO


class Model(nn.Module):
    """Uneven in every way, with a parameter that the loss may not reach."""

    def __init__(self, hidden=9):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down, self.norm = (
            nn.Embedding(11, 6),
            nn.Linear(6, hidden),
            nn.Linear(hidden, 6),
            nn.LayerNorm(6),
        )
        self.unused = nn.Linear(6, 5, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        return x @ self.embed.weight.T


def batch(step, rank=0, world=1, rows=12):
    """This rank's rows of a global batch."""
    ids = torch.randint(11, (rows, 5), generator=torch.Generator().manual_seed(step))
    return ids.chunk(world)[rank]


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def fsdp(mesh, model=None):
    model = model or Model()
    # FSDP2 gives what shares a unit with a used parameter zeros for a gradient
    for layer in (model.up, model.down, model.unused):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, optimizer, rank=0, world=1, steps=range(5), scaler=None, overflow_at=None):
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch(step, rank, world))
        if step == overflow_at and rank == world - 1:
            loss = loss * torch.inf
        if scaler is None:
            loss.backward(), optimizer.step()
        else:
            scaler.scale(loss).backward(), scaler.step(optimizer), scaler.update()


def assert_models_equal(sharded, single, **tolerance):
    for (name, q), p in zip(sharded.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(
            full(q.detach()),
            p.detach(),
            **tolerance or dict(rtol=1e-5, atol=2e-6),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def fsdp_equals_one_process(rank, world):
    for choice in KINDS:
        sharded, single = fsdp(mesh_of(world)), Model()
        b, a = (
            make(choice, sharded.parameters(), max_grad_norm=0.5),
            make(choice, single.parameters(), max_grad_norm=0.5),
        )
        train(sharded, b, rank, world), train(single, a)
        torch.testing.assert_close(b.grad_norm, a.grad_norm, rtol=1e-5, atol=1e-6)
        assert_models_equal(sharded, single)
        assert sharded.unused.weight not in b.state
        assert all(
            isinstance(v, DTensor) for values in b.state.values() for name, v in values.items() if name != "step"
        )


@on(2, 3)
def test_fsdp2_gives_what_one_process_gives(ranks):
    ranks.run(fsdp_equals_one_process)


def fsdp_fills_what_meta_left_empty(rank, world):
    mesh = mesh_of(world)
    for name in SCHEMES:
        config = ModelConfig(vocab_size=11, dim=12, heads=3, layers=1, context=5, position=name, tie_embeddings=False)
        with torch.device("meta"):
            sharded = Transformer(config)
        fully_shard(sharded.blocks[0], mesh=mesh), fully_shard(sharded, mesh=mesh)
        sharded.to_empty(device="cpu")
        for module in sharded.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        sharded.init_weights()
        single = Transformer(config)
        single.load_state_dict({name: full(p) for name, p in sharded.state_dict().items()})
        torch.testing.assert_close(sharded(batch(0)), single(batch(0)), **EXACT)
    with torch.device("meta"):
        slopes = fully_shard(ALiBi(3, learned=True), mesh=mesh).to_empty(device="cpu")
    slopes.reset_parameters()
    assert torch.equal(full(slopes.slopes), alibi_slopes(3))


@on(2)
def test_fsdp2_begins_on_meta_with_every_scheme(ranks):
    ranks.run(fsdp_fills_what_meta_left_empty)


def scalers_agree(rank, world, kind):
    """One rank's overflow skips the step of all; bits stay."""
    build = {"fastlm": GradScaler, "torch": torch.amp.GradScaler}[kind]
    others = [lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)] if kind == "fastlm" else []
    for make_optimizer in [
        *[lambda ps, c=c, clip=clip: make(c, ps, max_grad_norm=clip) for c in KINDS[-3:] for clip in (None, 0.5)],
        *others,
    ]:
        sharded, single = fsdp(mesh_of(world)), Model()
        b, a = make_optimizer(sharded.parameters()), make_optimizer(single.parameters())
        scalers = [build("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
        train(sharded, b, rank, world, range(2), scalers[1]), train(single, a, 0, 1, range(2), scalers[0])
        before = [p.detach().to_local().clone() for p in sharded.parameters()]
        train(sharded, b, rank, world, range(2, 3), scalers[1], overflow_at=2)
        assert all(torch.equal(p.to_local(), then) for p, then in zip(sharded.parameters(), before, strict=True))
        train(single, a, 0, 1, range(2, 3), scalers[0], overflow_at=2)
        train(sharded, b, rank, world, range(3, 5), scalers[1]), train(single, a, 0, 1, range(3, 5), scalers[0])
        assert scalers[0].get_scale() == scalers[1].get_scale() == 16.0
        assert_models_equal(sharded, single)


@on(2, 3)
@pytest.mark.parametrize("kind", ["fastlm", "torch"])
def test_loss_scaling_agrees_over_ranks(ranks, kind):
    ranks.run(scalers_agree, kind)


def tensor_parallel(rank, world):
    mesh = mesh_of(2, world // 2)
    for choice in KINDS[-5:]:
        model, single = Model(8), Model(8)  # torch's tensor parallelism divides evenly
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        sharded = fsdp(mesh["data"], parallelize_module(model, mesh["model"], plan)) if world > 2 else None
        sharded = sharded or parallelize_module(model, mesh["data"], plan)
        b, a = (
            make(choice, sharded.parameters(), max_grad_norm=0.5),
            make(choice, single.parameters(), max_grad_norm=0.5),
        )
        where = (mesh["data"].get_local_rank(), 2) if world > 2 else (0, 1)
        train(sharded, b, *where), train(single, a)
        assert_models_equal(sharded, single)


@on(2, 4)
def test_tensor_parallel_and_with_fsdp2(ranks):
    ranks.run(tensor_parallel)


def ddp_equals_a_double_batch(rank, world):
    for choice in KINDS:
        model, single = Model(), Model()
        del model.unused, single.unused
        b, a = make(choice, model.parameters(), max_grad_norm=0.5), make(choice, single.parameters(), max_grad_norm=0.5)
        train(nn.parallel.DistributedDataParallel(model), b, rank, world, scaler=GradScaler("cpu"), overflow_at=2)
        train(single, a, scaler=GradScaler("cpu"), overflow_at=2)
        assert_models_equal(model, single)


@on(2)
def test_ddp_gives_what_one_process_gives_for_the_whole_batch(ranks):
    ranks.run(ddp_equals_a_double_batch)


def zero_equals_one_process(rank, world):
    for choice in KINDS:
        for scaled, clip in ((False, 0.5), (True, 0.5), (True, None)):
            model, single = Model(), Model()
            del model.unused, single.unused
            options = choice.options | dict(max_grad_norm=clip)
            b = ZeroRedundancyOptimizer(
                model.parameters(),
                partial(optim.OPTIMIZERS[choice.optimizer], process_group=dist.group.WORLD),
                **options,
            )
            a = optim.OPTIMIZERS[choice.optimizer](single.parameters(), **options)
            scalers = [GradScaler("cpu") if scaled else None for _ in range(2)]
            overflow_at = 2 if scaled else None
            train(
                nn.parallel.DistributedDataParallel(model), b, rank, world, scaler=scalers[0], overflow_at=overflow_at
            )
            train(single, a, scaler=scalers[1], overflow_at=overflow_at)
            assert_models_equal(model, single)
            assert len(b.optim.state) < len(list(model.parameters()))
            b.consolidate_state_dict(to=0)
            if rank == 0:  # a state dict of whole parameters, in one optimizer's numbers
                a.load_state_dict(b.state_dict())


@on(2)
def test_zero_redundancy_optimizer(ranks):
    ranks.run(zero_equals_one_process)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


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

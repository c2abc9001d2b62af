"""Optimizers of models under FSDP2, tensor parallelism, DDP and ZeRO step as in one process."""

from functools import partial

import torch
import torch.distributed as dist
from formulas import KINDS
from sharded import EXACT, Model, assert_models_equal, batch, fsdp, full, make, mesh_of, on, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastlm import optim
from fastlm.amp import GradScaler
from fastlm.models import ModelConfig, Transformer
from fastlm.positions import SCHEMES, ALiBi, alibi_slopes


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
        fully_shard(sharded.decoder.blocks[0], mesh=mesh)
        fully_shard(sharded, mesh=mesh)
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
def test_loss_scaling_agrees_over_ranks(ranks):
    ranks.run(scalers_agree, "fastlm")


@on(2)
def test_torchs_loss_scaling_agrees_over_ranks(ranks):
    ranks.run(scalers_agree, "torch")


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

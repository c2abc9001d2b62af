"""What the tests of sharded optimizers share: ranks, meshes, tensors that are divided by hand, and models."""

import pytest
import torch
import torch.distributed as dist
from formulas import CHOICES, KINDS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastlm import optim

SHAPES = ((7, 5), (4,), (), (3, 6, 4), (1, 9), (0, 3))  # uneven everywhere; some ranks get nothing of some
EXACT = dict(rtol=1e-6, atol=1e-6)


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


INDICES = sorted({CHOICES.index(c) for c in KINDS})


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

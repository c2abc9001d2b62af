"""How a model in training is divided among ranks, by torch's engine (Rajbhandari et al. 2020, ZeRO; Zhao et al. 2023,
FSDP).

    none         every rank has all: DistributedDataParallel
    optimizer    the optimizer's states are divided (ZeRO 1): DistributedDataParallel and ZeroRedundancyOptimizer
    gradients    and gradients, between updates (ZeRO 2): fully_shard that keeps parameters whole until the update
    parameters   and parameters (ZeRO 3): fully_shard, a block at a time

Losses are sums over this rank's rows divided by the targets of all ranks', so gradients add up over ranks; torch's
engine averages them, which the trainer undoes by the factor `world` on the loss. Checkpoints hold whole tensors, so
that any number of ranks goes on from them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.models import ModelConfig
from fastlm.models.stack import Block
from fastlm.optim import Optimizer
from fastlm.optim.sharding import is_dtensor, placed_as
from fastlm.trainer.distributed.ranks import Ranks
from fastlm.trainer.options.training import Training
from fastlm.trainer.words import Refusal


def check(config: Training, shape: ModelConfig, ranks: Ranks) -> None:
    """Raises Refusal for what these ranks cannot share."""
    world = ranks.world
    if config.batch < world:
        raise Refusal(f"--batch {config.batch} has no row for each of {world} processes; give at least {world}")
    if config.tokens_at_once is not None and (rows := config.batch * config.accumulate) % world:
        raise Refusal(
            f"--max-tokens cuts {rows} rows of an update, --batch {config.batch} times --accumulate "
            f"{config.accumulate}, which {world} processes cannot share evenly; give a multiple of {world}"
        )
    if world > 1 and config.remembers(shape):
        cure = "give --memory 0, or train in one process"
        raise Refusal(f"--memory is of rows before, which {world} processes do not share; {cure}")


def bytes_each(parameters: int, gradients: int, states: int, world: int) -> dict[str, int]:
    """Each way to divide a model → bytes that one of `world` processes keeps through an update (Rajbhandari et al.
    2020). What a block gathers for its turn, and gradients that wait for the last micro-batch, come on top.
    """
    part = lambda whole: -(-whole // world)
    return {
        "none": parameters + gradients + states,
        "optimizer": parameters + gradients + part(states),
        "gradients": parameters + part(gradients) + part(states),
        "parameters": part(parameters) + part(gradients) + part(states),
    }


class _Asked(nn.Module):
    """A model that is asked through one forward, which is where DDP and FSDP look."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, question: Callable[..., Any], *args) -> Any:
        return question(self.model, *args)


class Division:
    """A model on this rank, and what gathers it.

    Args:
        model: whole, the same on every rank; afterwards its parameters are what `shard` leaves here.
        shard: "none", "optimizer", "gradients" or "parameters".
        ranks: the processes.
    """

    def __init__(self, model: nn.Module, shard: str, ranks: Ranks):
        self.model, self.shard, self.ranks = model, shard, ranks
        self.divides = ranks.world > 1 and shard in ("gradients", "parameters")
        if self.divides:
            self._asked = _fully_sharded(model, whole_until_update=shard == "gradients")
        elif ranks.world > 1:
            # looking for unused parameters keeps the buckets as they are, whatever order gradients come in, so that a
            # resumed run adds up in the same order
            self._asked = nn.parallel.DistributedDataParallel(_Asked(model), find_unused_parameters=True)

    def optimizer(self, make: type[torch.optim.Optimizer], groups: list[dict], **options) -> torch.optim.Optimizer:
        """An optimizer over the parameters that are here, its states divided as `shard` says."""
        if self.ranks.world == 1 or self.shard != "optimizer":
            return make(groups, **options)
        from torch.distributed import group
        from torch.distributed.optim import ZeroRedundancyOptimizer

        if issubclass(make, Optimizer):  # whose norm is over all ranks' parameters
            make = partial(make, process_group=group.WORLD)
        return ZeroRedundancyOptimizer(groups, optimizer_class=make, **options)

    def ask(self, question: Callable[..., Any], model: nn.Module, *args) -> Any:
        """question(model, *args) where gradients are to be added up over ranks."""
        return question(model, *args) if self.ranks.world == 1 else self._asked(question, *args)

    def ask_alone(self, question: Callable[..., Any], model: nn.Module, *args) -> Any:
        """question(model, *args) without a gradient."""
        return self._asked(question, *args) if self.divides else question(model, *args)

    @contextmanager
    def adding_up(self, now: bool) -> Iterator[None]:
        """Inside the `with` block, gradients are added up over ranks at each backward pass, or stay for a later one."""
        if self.divides:
            self._asked.set_requires_gradient_sync(now)
        if now or self.divides or self.ranks.world == 1:
            yield
        else:
            with self._asked.no_sync():
                yield

    # -----------------------------------------------------------------------------------------------------------------
    # Whole again

    def whole(self, make: Callable[[], nn.Module]) -> nn.Module | None:
        """The model with all of its weights on the first rank, and None on others; the model itself on every rank that
        has all of it. make: a new model of this shape.
        """
        if not self.divides:
            return self.model
        state = {name: _whole(x, self.ranks.speaks) for name, x in self._parts().items()}
        if not self.ranks.speaks:
            return None
        with torch.random.fork_rng(devices=[]):  # weights are drawn and overwritten
            copy = make()
        copy.load_state_dict(state)
        return copy.train(self.model.training)

    @contextmanager
    def filling(self, make: Callable[[], nn.Module]) -> Iterator[nn.Module]:
        """A whole model whose weights are written in the `with` block; then this rank takes its part of them. make: as
        in `whole`.
        """
        if not self.divides:
            yield self.model
            return
        whole = make()
        yield whole
        theirs = whole.state_dict()
        with torch.no_grad():
            for name, x in self._parts().items():
                x.copy_(placed_as(theirs[name], x))

    def _parts(self) -> dict[str, Tensor]:
        """The model's state dict in this rank's parts: asked of FSDP's root, which divides again what it gathered."""
        return {name.removeprefix("model."): x for name, x in self._asked.state_dict().items()}

    def whole_states(self, optimizer: torch.optim.Optimizer) -> dict | None:
        """The state of each parameter, by its number, on the first rank; others may have None."""
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict(to=0)
            return optimizer.state_dict()["state"] if self.ranks.speaks else None
        states = optimizer.state_dict()["state"]
        return {i: {name: _whole(x, self.ranks.speaks) for name, x in state.items()} for i, state in states.items()}


def inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that ZeroRedundancyOptimizer makes of this rank's parameters; others are their own."""
    return getattr(optimizer, "optim", optimizer)


def _fully_sharded(model: nn.Module, whole_until_update: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.modules():
        if isinstance(block, Block):
            fully_shard(block, reshard_after_forward=not whole_until_update)
            register_fsdp_forward_method(block, "keys")
    return fully_shard(_Asked(model), reshard_after_forward=False)


def _whole(x: Tensor, kept: bool) -> Tensor | None:
    """All of a tensor that may lie on several ranks, on a CPU if it did; every rank has to ask for it."""
    if not is_dtensor(x):
        return x
    whole = x.detach().full_tensor()
    return whole.cpu() if kept else None

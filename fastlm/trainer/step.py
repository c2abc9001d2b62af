"""The training step, and nothing around it: micro-batches, loss, backward, schedule, update, a sample.

Everything here is a function of (configuration, data, step): batches and dropout come from the step's number, the
learning rate from the schedule, so a trainer set to step s with the weights, optimizer state and recurrences of step s
goes on as if it had never stopped. The host waits for the device only when numbers are read.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.amp import GradScaler
from fastlm.models import Recurrence, Remembering, Transformer
from fastlm.models.heads import Headed
from fastlm.objectives import Batch, Objective, Vocabulary, noise
from fastlm.objectives.base import placed
from fastlm.optim import OPTIMIZERS, Optimizer, decay_groups, layer_groups
from fastlm.optim.sharding import is_dtensor, local
from fastlm.trainer.data.tokenizer import load_tokenizer, vocabulary
from fastlm.trainer.data.tokens import Tokens
from fastlm.trainer.distributed import shards
from fastlm.trainer.distributed.ranks import ALONE, Ranks
from fastlm.trainer.evaluation import Evaluation, autocast, total
from fastlm.trainer.options.training import Training
from fastlm.trainer.pull import Pull
from fastlm.trainer.schedule import Moment
from fastlm.trainer.tasks import Task
from fastlm.trainer.words import Refusal

MOMENTUM = 0.9  # of SGD


@dataclass(frozen=True)
class Update:
    """What one update did. losses: "loss", and each term's mean over its targets, of which the loss is the weighted
    sum; norm: of the gradient before clipping; clipped: 1 if that was above the bound; overflow: 1 if it was skipped;
    scale: of the loss, in fp16. These are tensors on the device. tokens: of this update; seen: of all up to it.
    """

    losses: dict[str, Tensor]
    norm: Tensor | None
    clipped: Tensor | None
    overflow: Tensor | None
    scale: Tensor
    lr: float
    tokens: int
    seen: int
    targets: int


class Trainer:
    """A model in training. step: updates done so far, of `steps`. recurrences: what the model remembers of each
    micro-batch of the last update, where the rows of the next one go on; none for a model without memory. pull: what
    draws weights back to those that the run began with; None unless it is given. check: called before each micro-batch
    and each batch of an evaluation; when it raises, all of this is as the last update left it. ranks: the processes
    that train it, each of which has a part of every batch's rows and, as --shard says, of the model.
    """

    def __init__(
        self,
        config: Training,
        tokens: Tokens,
        steps: int,
        check: Callable[[], None] = lambda: None,
        ranks: Ranks = ALONE,
    ):
        self.config, self.steps, self.step, self.check, self.ranks = config, steps, 0, check, ranks
        self.device = config.torch_device()
        shape = config.model(tokens.facts.vocab_size)
        shards.check(config, shape, ranks)
        self.tokenizer = load_tokenizer(tokens.tokenizer_file)
        known = vocabulary(self.tokenizer)
        self.remembers = config.remembers(shape)
        streams = config.batch * config.accumulate if self.remembers else None
        self.curve = config.curve()
        self.course, contexts = config.course(steps), config.contexts(shape.context)
        self.stages = [make_objective(config, "train", tokens.train, context, known, streams) for context in contexts]
        self.train = self.stages[-1]
        self.held_out = make_objective(config, "held-out", tokens.held_out, shape.context, known)
        self.shape = shape
        self.model = self._new_model().to(self.device)
        self.division = shards.Division(self.model, config.shard, ranks)
        self.optimizer = make_optimizer(config, self.model, self.division)
        self.scaler = GradScaler(self.device.type, enabled=config.dtype == "fp16")
        self.recurrences: list[Recurrence] = []
        self.pull: Pull | None = None
        self.evaluation = Evaluation(
            self.held_out, config.rows_at_once(shape.context), self.device, config.dtype,
            bytes_of=torch.from_numpy(tokens.bytes_of()) if self.held_out.reports_bits_per_byte else None,
            remembers=self.remembers, check=check, ask=self.division.ask_alone, ranks=ranks,
        )  # fmt: skip

    def whole(self) -> nn.Module | None:
        """The model with all of its weights, wherever they lie; None on ranks that do not gather them."""
        return self.division.whole(self._new_model)

    def filling(self) -> AbstractContextManager[nn.Module]:
        """The model, or one like it whose weights this rank takes its part of at the end of the `with` block."""
        return self.division.filling(self._new_model)

    def _new_model(self) -> nn.Module:
        torch.manual_seed(noise.number(self.config.seed, noise.Purpose.WEIGHTS, 0))
        return self.train.model(self.shape)

    def exported(self, model: nn.Module) -> Transformer | Headed:
        """What of a whole model others open."""
        return self.train.exported(model)

    def remember(self, held: list[dict[str, Tensor]]) -> None:
        """Go on from what the `recurrences` held. Raises ValueError if they are not those of its micro-batches."""
        if held and len(held) != self.config.accumulate * self.remembers:
            raise ValueError(f"{len(held)} micro-batches are remembered, and an update has {self.config.accumulate}")
        self.recurrences = [self.model.new_recurrence() for _ in held]
        for recurrence, state in zip(self.recurrences, held, strict=True):
            recurrence.load_state_dict(state)

    @property
    def tokens_per_update(self) -> int:
        """Of one with all of its micro-batches and the longest rows."""
        return self.config.batch * self.config.accumulate * self.train.tokens_per_row

    def tokens_before(self, step: int) -> int:
        """Tokens of the first `step` updates."""
        rows = self.course.rows_of_stages(step)
        return sum(n * objective.tokens_per_row for n, objective in zip(rows, self.stages, strict=True))

    def objective(self) -> Objective:
        """What the next update learns."""
        return self.stages[self.course.stage(self.step)].at(self.step / self.steps)

    def lr(self) -> float:
        """Of the next update."""
        config, in_tokens = self.config, self.config.schedule_by == "tokens"
        done, after, total = (
            self.tokens_before(step) if in_tokens else step for step in (self.step, self.step + 1, self.steps)
        )
        return config.lr * self.curve(Moment(done, after, total, round(config.warmup * total), config.min_lr_ratio))

    def update(self) -> Update:
        """One step of the optimizer over the micro-batches of its rows, each term divided by its targets in all of
        them.
        """
        config = self.config
        objective, first, after = self.objective(), *map(self.course.rows_before, (self.step, self.step + 1))
        batches = self._batches(objective, first, after - first)
        counts = self.ranks.total(total([objective.targets(batch) for batch in batches]))
        torch.manual_seed(noise.number(config.seed, noise.Purpose.DROPOUT, self.ranks.rank, self.step))
        self.model.train()
        losses: dict[str, Tensor] = {}
        models, recurrences = self._remembering(first, len(batches))
        for i, (model, batch) in enumerate(zip(models, batches, strict=True), start=1):
            self.check()
            with self.division.adding_up(now=i == len(batches)):
                with autocast(config.dtype, self.device):
                    sums = self.division.ask(objective.loss, model, placed(batch, self.device))
                means = objective.means(sums, counts)
                self.scaler.scale(self.ranks.world * means["loss"]).backward()
            losses = total([losses, {name: value.detach() for name, value in means.items()}])
        lr, norm = self._step_optimizer()
        self.recurrences = recurrences
        scale = self.scaler.scale(torch.ones((), device=self.device))  # get_scale() would wait for the device
        self.step += 1
        overflow, targets = getattr(shards.inner(self.optimizer), "overflow", None), sum(counts.values())
        clipped = None if norm is None or not config.clip else (norm > config.clip) & norm.isfinite()
        tokens, seen = (after - first) * objective.tokens_per_row, self.tokens_before(self.step)
        return Update(self.ranks.sums(losses), norm, clipped, overflow, scale, lr, tokens, seen, targets)

    def _batches(self, objective: Objective, first: int, count: int) -> list[Batch]:
        """Micro-batches of `count` samples from `first` on, this rank's part of each."""
        config, ranks = self.config, self.ranks
        if isinstance(objective, Task) and config.tokens_at_once is not None:
            return objective.batches_of(config.seed, first, count, config.tokens_at_once, ranks.rank, ranks.world)
        part = ranks.part(config.batch)
        begins = range(first + part.start, first + count, config.batch)
        return [objective.batch(config.seed, begin, part.stop - part.start) for begin in begins]

    def _remembering(self, first: int, count: int) -> tuple[list[nn.Module], list[Recurrence]]:
        """The model as each of `count` micro-batches from sample `first` on sees it, and what it then remembers."""
        if not self.remembers:
            return [self.model] * count, []
        if self.train.begins(first):
            recurrences = [self.model.new_recurrence() for _ in range(count)]
        else:
            recurrences = [recurrence.copy() for recurrence in self.recurrences]
        return [Remembering(self.model, recurrence) for recurrence in recurrences], recurrences

    def _step_optimizer(self) -> tuple[float, Tensor | None]:
        """The learning rate of the step, and the gradient's norm before clipping."""
        lr, clips = self.lr(), isinstance(shards.inner(self.optimizer), Optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        norm = None if clips else self._clip()
        self.scaler.step(self.optimizer)
        if self.pull is not None:
            self.pull.step(self.optimizer.param_groups, self._skipped())
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return lr, shards.inner(self.optimizer).grad_norm if clips else norm

    def _skipped(self) -> Tensor | None:
        """1 if the optimizer's step was skipped, for gradients that are not finite; None if they were not looked at."""
        flags = [getattr(shards.inner(self.optimizer), "overflow", None), self.scaler.skipped(self.optimizer)]
        known = [flag for flag in flags if flag is not None]
        return torch.stack(known).amax() if known else None

    def _clip(self) -> Tensor:
        """Clip for an optimizer of a plugin, which does not do it itself. Returns the norm before."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        return norm.full_tensor() if is_dtensor(norm) else norm

    def evaluate(self, windows: int | None = None) -> dict[str, float]:
        """What `Evaluation` finds of the model over held-out text."""
        return self.evaluation.of(self.model, windows)

    @torch.no_grad()
    def sample(self, n: int) -> str:
        """About n tokens of what the model can do, as its objective shows it; the same at the same step."""
        self.model.eval()
        seed = noise.number(self.config.seed, noise.Purpose.SAMPLE, 0, self.step)
        generator = torch.Generator(self.device).manual_seed(seed)
        model = self.whole()
        return "" if model is None else self.held_out.sample(model, n, generator, self.tokenizer.decode)

    def finite(self) -> bool:
        """Whether every parameter is a finite number. The host waits for the device."""
        return bool(torch.stack([local(p).isfinite().all() for p in self.model.parameters()]).all())


def make_objective(
    config: Training, side: str, ids: np.ndarray, context: int, known: Vocabulary, streams: int | None = None
) -> Objective:
    """The configured objective over one side of the text. Raises Refusal, naming the side, if it is too short."""
    try:
        return config.objective_over(ids, context, known, streams)
    except ValueError as error:
        raise Refusal(f"the {side} side of the text has {error}") from error


def make_optimizer(config: Training, model: nn.Module, division: shards.Division) -> torch.optim.Optimizer:
    """The configured optimizer over the model's parameters, divided as the model is. betas and momentum go to those
    that have them; a relative step would take no notice of the schedule.
    """
    make = OPTIMIZERS[config.optimizer]
    known = inspect.signature(make).parameters
    options = dict(betas=config.betas, momentum=MOMENTUM, relative_step=False)
    options = {name: value for name, value in options.items() if name in known}
    groups = decay_groups(model, config.weight_decay)
    if config.layer_decay != 1:
        groups = layer_groups(model, 1.0, config.layer_decay, config.weight_decay)
        groups = [group | {"share": group.pop("lr")} for group in groups]  # of the rate that the schedule says
    optimizer = division.optimizer(make, groups, lr=config.lr, **options)
    if isinstance(shards.inner(optimizer), Optimizer):
        shards.inner(optimizer).max_grad_norm = config.clip or None
    return optimizer

"""What an objective is: it makes batches, and turns a model's answer into sums of loss. OBJECTIVES has each by name.

A batch is a pure function of the seed and the numbers of its samples: sample s of n in the data is sample s mod n of
epoch s div n. A loss is one sum per term, kept apart from its number of targets. The trainer divides each term by its
targets in the whole step, however that was cut into micro-batches, and adds the means up, times the terms' weights;
averages inside a micro-batch would be wrong where counts differ.
"""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import whole
from fastlm.models import ModelConfig, Transformer
from fastlm.models.heads import Factors
from fastlm.nn.loss import linear_cross_entropy
from fastlm.objectives.vocabulary import Vocabulary

OBJECTIVES: dict[str, type["Objective"]] = {}
IGNORED = -100  # a label that is no target, as in torch.nn.functional.cross_entropy
Batch = dict[str, Tensor]
Decode = Callable[[list[int]], str]
Terms = dict[str, Tensor]  # term → its loss summed over its targets
Shares = dict[str, tuple[Tensor, ...]]  # name → (how many, of how many), or other sums that `measure` knows


class Objective:
    """An objective over one stream of token ids. Subclass it with a name, and define its methods.

    Args:
        tokens: [N] ids, the stream; <eos> separates documents.
        context: tokens that a row gives the model.
        vocabulary: the ids' meaning.

    Attributes:
        name: its name in OBJECTIVES; a subclass without one is a base for others.
        kind: of the models that it trains, as in `ModelConfig`. Default "decoder".
        shape: fields of `ModelConfig` that its models have, whatever the preset says. Default none.
        extra_ids: ids that its models have after the tokenizer's. Default 0.
        reports_bits_per_byte: whether the loss is a code length of the text, so that bits per byte mean something.
            Default False.
        weights: term → what its mean is multiplied by in the loss; default 1 for those not named.
        compared: the term in nats a token that guessing by frequency is compared with. Default "loss", the only one.
        shares: names of what `evaluate` counts besides the loss. Default none.
        unit: of the loss. Default "nats".
        per: what it is the mean over. Default "token".
        looked_at: how many windows a quick evaluation looks at. Default 64.
        continues: whether its rows can go on where others ended, for models that remember those; then it takes
            `streams`, how many of them an update has. Default False.

    Raises:
        ValueError: if the stream is too short for a single row.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "decoder"
    shape: ClassVar[dict] = {}
    extra_ids: ClassVar[int] = 0
    reports_bits_per_byte: ClassVar[bool] = False
    weights: ClassVar[dict[str, float]] = {}
    compared: ClassVar[str] = "loss"
    shares: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "nats"
    per: ClassVar[str] = "token"
    looked_at: ClassVar[int] = 64
    continues: ClassVar[bool] = False

    def __init_subclass__(cls, name: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            OBJECTIVES[name] = cls

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary):
        whole(1, context=context)
        self.tokens, self.context, self.vocabulary = tokens, context, vocabulary

    def model(self, config: ModelConfig) -> nn.Module:
        """A new model to train.

        Args:
            config: the shape that the preset and the flags say, with the fields of `shape`.

        Returns:
            The module that `loss` is given; by default a Transformer.
        """
        return Transformer(config)

    def exported(self, model: nn.Module) -> Transformer:
        """What of a trained model is written for others to open; by default all of it.

        Args:
            model: the module that `model` made.
        """
        return model

    def begin_with(self, model: nn.Module, trained: Transformer) -> list[str]:
        """Give a new model the weights of a trained one.

        Args:
            model: the module that `model` made.
            trained: of the same shape, but for its heads.

        Returns:
            Names of the model's parameters and buffers that `trained` lacks, which stay as they were drawn.

        Raises:
            ValueError: for tensors of other shapes, and for a module whose exported weights are made from several.
        """
        exported = self.exported(model)
        if not {id(p) for p in exported.parameters()} <= {id(p) for p in model.parameters()}:
            raise ValueError(f"a model of {self.name} holds more than was written; give a run with its state/")
        anew, there = copy_weights(exported, trained), exported.state_dict(keep_vars=True)
        given = {id(there[name]) for name in there.keys() - set(anew)}
        return [name for name, x in model.state_dict(keep_vars=True).items() if id(x) not in given]

    def entries(self) -> dict:
        """More of the config.json that is written beside a trained model; by default none."""
        return {}

    def __len__(self) -> int:
        """Samples in an epoch."""
        raise NotImplementedError

    @property
    def tokens_per_row(self) -> int:
        """How many tokens a row has on average; by default as many as it may have."""
        return self.context

    @property
    def windows(self) -> int:
        """How many `fixed` windows there are."""
        raise NotImplementedError

    def batch(self, seed: int, first: int, count: int) -> Batch:
        """Samples of the training order.

        Args:
            seed: of the order and of all that is random.
            first: the first sample's number, from 0 on, through all epochs.
            count: how many samples.

        Returns:
            Name → tensor, as `targets` and `loss` read it.
        """
        raise NotImplementedError

    def at(self, progress: float) -> "Objective":
        """What it is at a share of the run, where it is not the same throughout. Default the same."""
        return self

    def begins(self, first: int) -> bool:
        """Whether samples from `first` on, as many as an update has, go on where none before ended. Default yes."""
        return True

    def fixed(self, numbers: np.ndarray) -> Batch:
        """The windows with these numbers, the same at every evaluation.

        Args:
            numbers: [n] int, windows in the text's order, from 0 to `windows` - 1.

        Returns:
            A batch, as `batch` gives it.
        """
        raise NotImplementedError

    def check_windows(self, numbers: np.ndarray) -> None:
        """Raise ValueError for numbers that no `fixed` window has."""
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.windows:
            raise ValueError(f"windows {numbers.min()} to {numbers.max()} of {self.windows}, which are counted from 0")

    def any_fixed(self, generator: torch.Generator) -> Batch:
        """A batch of one held-out window that a generator draws, on the generator's device."""
        number = torch.randint(self.windows, (), generator=generator, device=generator.device).item()
        return placed(self.fixed(np.array([number])), generator.device)

    def targets(self, batch: Batch) -> dict[str, int]:
        """How many targets a batch has.

        Args:
            batch: what `batch` or `fixed` made.

        Returns:
            Term → its number of targets; by default one term, the labels that are not IGNORED.
        """
        return {"loss": int((batch["labels"] != IGNORED).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        """The loss of a model on a batch.

        Args:
            model: the module that the objective trains.
            batch: what `batch` or `fixed` made.

        Returns:
            Term → loss in nats summed over its targets, an fp32 scalar.
        """
        raise NotImplementedError

    def means(self, sums: dict, counts: dict[str, int]) -> dict:
        """The loss of several batches.

        Args:
            sums: term → its loss summed over all targets.
            counts: term → its number of targets.

        Returns:
            "loss", and each term over its targets, of which it is the sum by `weights`.
        """
        means = {name: value / max(1, counts[name]) for name, value in sums.items()}
        return {"loss": sum(self.weights.get(name, 1.0) * value for name, value in means.items())} | means

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        """The loss, and what else tells a person how good the model is.

        Args:
            model: the module that the objective trains.
            batch: what `fixed` made.

        Returns:
            (what `loss` gives; each of `shares` → sums that `measure` knows, scalars). By default no share.
        """
        return self.loss(model, batch), {}

    def measure(self, name: str, sums: Tensor) -> float:
        """What a share comes to.

        Args:
            name: one of `shares`.
            sums: fp64, what `evaluate` gave for it, each summed over all batches.

        Returns:
            By default the first over the second, how many of how many.
        """
        return (sums[0] / sums[1].clamp(min=1)).item()

    def worded(self, name: str, value: float) -> str:
        """A share as people read it; by default as a percentage.

        Args:
            name: one of `shares`.
            value: what `measure` returned.
        """
        return f"{value:.1%}"

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """Something a person can read: what the model makes of nothing, or of held-out text.

        Args:
            model: the module that the objective trains.
            n: about how many tokens to show.
            generator: of the random numbers, on the model's device.
            decode: token ids → text.

        Returns:
            The text; by default none.
        """
        return ""


def placed(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, which the host does not wait for."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}


def summed_cross_entropy(answer: Tensor | Factors, labels: Tensor) -> Tensor:
    """-Σ log softmax(logits)[label] in fp32.

    Args:
        answer: logits [..., V], or what they are made of, and then they are never there as a whole.
        labels: [...] int64, IGNORED where there is no target.
    """
    labels = labels.flatten()
    if isinstance(answer, Factors):
        hidden, weight, bias = answer
        return linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias, ignore_index=IGNORED, reduction="sum")
    return F.cross_entropy(answer.float().flatten(0, -2), labels, ignore_index=IGNORED, reduction="sum")


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(targets whose likeliest class is the label, targets): logits [..., V], labels [...] as above."""
    return (logits.argmax(-1) == labels).sum(), (labels != IGNORED).sum()


@torch.no_grad()
def copy_weights(model: nn.Module, trained: nn.Module) -> list[str]:
    """Copy by name what both models have; return the names that `trained` lacks. Raises ValueError for other shapes."""
    mine, theirs = model.state_dict(), trained.state_dict()
    shared = mine.keys() & theirs.keys()
    for name in sorted(shared):
        if mine[name].shape != theirs[name].shape:
            raise ValueError(f"{name} is {list(theirs[name].shape)}, and has to be {list(mine[name].shape)}")
    for name in shared:
        mine[name].copy_(theirs[name])
    return [name for name in mine if name not in theirs]

"""What a task is: an objective over labelled examples, in place of a stream of ids. TASKS has each by name."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models import ModelConfig, Transformer
from fastlm.models.heads import RowClassifier
from fastlm.objectives import Batch, Objective, Vocabulary
from fastlm.objectives.base import copy_weights, placed
from fastlm.objectives.samples import ByLength, Order, micro_batches
from fastlm.trainer.tasks.layout import Ids, Layout
from fastlm.trainer.tasks.rows import Row

TASKS: dict[str, type["Task"]] = {}
SHOWN = 3  # examples of a sample


class Example(NamedTuple):
    """A row that a model reads, and what it is to say of it.

    Args:
        row: ids.
        target: what a task makes of the answer; None where the answer was left out with what was too long.
        said: the row as it was given, to show.
        places: of the second text's ids, where each begins and ends in it, in characters; empty where nobody asks.
    """

    row: Ids
    target: object
    said: Row
    places: Sequence[tuple[int, int]] = ()


class Baseline(NamedTuple):
    """What is reached by one who has learned nothing but the train side's answers.

    Args:
        guess: what is guessed, in words; loss: that guess's, over the held-out side.
        share: one of the task's shares; value: what the best constant answer reaches of it; constant: that answer, in
            words. None where no share tells.
    """

    guess: str
    loss: float
    share: str | None = None
    value: float = 0.0
    constant: str = ""


class Head(NamedTuple):
    """How a model's rows are read.

    Args:
        pooling: a name in `POOLINGS`.
        labels: the labels, in their order.
    """

    pooling: str
    labels: tuple[str, ...] = ()


class Task(Objective):
    """An objective over labelled examples; an epoch is all of them, in an order of its own. Subclass it with a name,
    and define its methods.

    Args:
        examples: of one side, as `encode` makes them.
        context: ids of a row at most.
        vocabulary: the ids' meaning.
        shape: of the model that is fine-tuned.
        head: how its rows are read.
    """

    per = "example"
    looked_at = 256  # an example is one target where a window of text is many
    bare: ClassVar[bool] = True  # whether the model is wanted without the heads of pretraining

    def __init_subclass__(cls, name: str | None = None):
        super().__init_subclass__()
        if name is not None:
            cls.name = name
            TASKS[name] = cls

    def __init__(
        self, examples: Sequence[Example], context: int, vocabulary: Vocabulary, shape: ModelConfig, head: Head
    ):
        super().__init__(examples, context, vocabulary)
        if not len(examples):
            raise ValueError("0 examples; give more rows")
        self.examples, self.head, self.end = examples, head, vocabulary.eos
        self.layout = Layout.of(shape, head.pooling, vocabulary)
        self.both = shape.kind == "encoder-decoder"
        self.order = Order(len(examples))

    @classmethod
    def shape_of(cls, shape: ModelConfig) -> dict:
        """Fields of a model's shape that are others in the task: without the heads of pretraining where it has its
        own.
        """
        return dict(head="none", pair_labels=0, pooler=False, mask_decoder=False) if cls.bare else {}

    @staticmethod
    def encode(row: Row, layout: Layout, head: Head, encoding: Callable) -> Example:
        """An example of a row; encoding: text → its ids, with where each begins and ends in the text. Raises
        ValueError, saying why the row cannot be learned from.
        """
        raise NotImplementedError

    @staticmethod
    def baseline(train: Sequence[Example], held_out: Sequence[Example], head: Head) -> Baseline:
        """What one reaches who has learned nothing."""
        raise NotImplementedError

    def make(self, examples: list[Example]) -> Batch:
        """A batch of these. `batch` and `fixed` add examples [B] int64, their numbers."""
        raise NotImplementedError

    def answers(self, model: nn.Module, batch: Batch, examples: list[Example], decode: Callable) -> list[str]:
        """What the model says of each example of a batch, in words; decode: ids → text."""
        raise NotImplementedError

    def entries(self) -> dict:
        """Of a config.json: what its labels mean."""
        return {}

    def exported(self, model: nn.Module) -> nn.Module:
        return model

    def begin_with(self, model: nn.Module, trained: Transformer) -> list[str]:
        """As in `Objective`. BERT's pooler is the dense layer of its classifier."""
        if isinstance(model, Transformer):
            return copy_weights(model, trained)
        anew = copy_weights(model.model, trained)
        pooler = getattr(trained.pair_head, "pooler", None)
        pooled = isinstance(model, RowClassifier) and self.head.pooling == "bert" and pooler is not None
        if pooled:
            copy_weights(model.dense, pooler)
        heads = (name for name, _ in model.named_parameters() if not name.startswith("model."))
        heads = (name for name in heads if not (pooled and name.startswith("dense.")))
        return [*(f"model.{name}" for name in anew), *heads]

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def tokens_per_row(self) -> int:
        return max(1, round(self.lengths.mean()))

    def order_by_length(self, batch: int) -> None:
        """Have examples that learn together, `batch` at a time, be about as long as one another."""
        self.order = ByLength(self.lengths, batch)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[examples] int: ids of each row."""
        return np.array([len(example.row.ids) for example in self.examples])

    @property
    def windows(self) -> int:
        return len(self.examples)

    def batch(self, seed: int, first: int, count: int) -> Batch:
        numbers, _ = self.order.drawn(seed, first, count)
        return self._made(numbers)

    def batches_of(
        self, seed: int, first: int, count: int, max_tokens: int, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """Samples first … first + count - 1 of the training order, in micro-batches of about one length.

        Args:
            seed: of the order.
            first, count: which samples; count is a multiple of world.
            max_tokens: ids of a micro-batch with its padding, at most.
            rank: this process's number. Default 0.
            world: how many there are. Default 1.

        Returns:
            This process's part of each micro-batch; as many in every process, none of them empty.
        """
        numbers, _ = self.order.drawn(seed, first, count)
        cut = micro_batches(self.lengths[numbers.numpy()], max_tokens, world)
        return [self._made(numbers[torch.from_numpy(some[rank::world])]) for some in cut]

    def fixed(self, numbers: np.ndarray) -> Batch:
        numbers = np.asarray(numbers)
        self.check_windows(numbers)
        return self._made(torch.from_numpy(numbers))

    def _made(self, numbers: Tensor) -> Batch:
        return self.make([self.examples[i] for i in numbers.tolist()]) | {"examples": numbers}

    def read(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """What a head makes of a batch's rows."""
        inputs = batch["inputs"]
        options = {"attention_mask": batch["real"]} | ({"token_types": batch["types"]} if "types" in batch else {})
        if self.both:  # as BART does: its decoder reads the row that its encoder reads
            start = torch.full_like(inputs[:, :1], self.vocabulary.pad)
            return model(inputs, torch.cat((start, inputs[:, :-1]), 1), **options)
        return model(inputs, **options)

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Callable) -> str:
        """Examples of the held-out side, each with what the model says of it, and after | what it is where that
        differs.
        """
        shown = []
        for _ in range(min(SHOWN, len(self))):
            number = torch.randint(len(self), (), generator=generator, device=generator.device).item()
            example = self.examples[number]
            batch = placed(self.make([example]), generator.device)
            (said,) = self.answers(model, batch, [example], decode)
            shown.append(self.shown(example, said, n, decode))
        return "\n".join(shown)

    def shown(self, example: Example, said: str, n: int, decode: Callable) -> str:
        """An example as a sample shows it: the first n ids of its texts, ‖ between them, and the answers."""
        ids, second, _ = example.row
        first = decode([i for i in ids[:second] if i >= self.vocabulary.specials][:n])
        more = [i for i in ids[second:] if i >= self.vocabulary.specials][:n]
        text = f"{first} ‖ {decode(more)}" if more else first
        true = example.said.answer
        return f"{text}\n→ {said}{f' | {true}' * (said != true)}"

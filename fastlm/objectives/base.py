"""What an objective is: it makes batches, and turns a model's answer into sums of loss. OBJECTIVES has each by name.

A batch is a pure function of the seed and the numbers of its samples: sample s of n in the data is sample s mod n of
epoch s div n. A loss is one sum per term, kept apart from its number of targets. The trainer divides by the targets of
the whole step, however it was cut into micro-batches; averages inside a micro-batch would be wrong where counts differ.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

OBJECTIVES: dict[str, type["Objective"]] = {}
IGNORED = -100  # a label that is no target, as in torch.nn.functional.cross_entropy
Batch = dict[str, Tensor]
Decode = Callable[[list[int]], str]


class Vocabulary(NamedTuple):
    """The ids that objectives know. Those below `specials` are no text: never targets, never drawn at random.

    Args:
        size: ids of the tokenizer.
        specials: how many special ids come first. Default 5.
        pad: fills rows, and starts an encoder–decoder's decoder. Default 0.
        eos: ends a document. Default 1.
        mask: stands for a token that is hidden. Default 4.
    """

    size: int
    specials: int = 5
    pad: int = 0
    eos: int = 1
    mask: int = 4


class Objective:
    """An objective over one stream of token ids. Subclass it with a name, and define its methods.

    Args:
        tokens: [N] ids, the stream; <eos> separates documents.
        context: tokens that a row gives the model.
        vocabulary: the ids' meaning.

    Attributes:
        name: its name in OBJECTIVES.
        kind: of the models that it trains, as in `ModelConfig`. Default "decoder".
        shape: fields of `ModelConfig` that its models have, whatever the preset says. Default none.
        extra_ids: ids that its models have after the tokenizer's. Default 0.
        reports_bits_per_byte: whether the loss is a code length of the text, so that bits per byte mean something.
            Default False.

    Raises:
        ValueError: if the stream is too short for a single row.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "decoder"
    shape: ClassVar[dict] = {}
    extra_ids: ClassVar[int] = 0
    reports_bits_per_byte: ClassVar[bool] = False

    def __init_subclass__(cls, name: str, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.name = name
        OBJECTIVES[name] = cls

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary):
        self.tokens, self.context, self.vocabulary = tokens, context, vocabulary

    def __len__(self) -> int:
        """Samples in an epoch."""
        raise NotImplementedError

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

    def fixed(self, numbers: np.ndarray) -> Batch:
        """The windows with these numbers, the same at every evaluation.

        Args:
            numbers: [n] int, windows in the text's order, from 0 to `windows` - 1.

        Returns:
            A batch, as `batch` gives it.
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> dict[str, int]:
        """How many targets a batch has.

        Args:
            batch: what `batch` or `fixed` made.

        Returns:
            Term → its number of targets; by default one term, the labels that are not IGNORED.
        """
        return {"loss": int((batch["labels"] != IGNORED).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss of a model on a batch.

        Args:
            model: the module that the objective trains.
            batch: what `batch` or `fixed` made.

        Returns:
            Term → loss in nats summed over its targets, an fp32 scalar.
        """
        raise NotImplementedError

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

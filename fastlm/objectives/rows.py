"""What objectives share whose rows are windows of a stream, all of one length."""

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models.heads import Factors
from fastlm.objectives.base import Batch, Objective, Shares, Terms, hits, summed_cross_entropy
from fastlm.objectives.noise import Samples
from fastlm.objectives.samples import MixedWindows, Mixture, Streams, Windows
from fastlm.objectives.vocabulary import Vocabulary


class RowObjective(Objective):
    """An objective over windows of the stream: define `make`, which turns windows into a batch with labels, and
    `factors`, the model's answer. One whose loss is another defines `loss` and `evaluate` instead.

    Args:
        tokens: [N] ids, or a mixture of several sources.
        context, vocabulary: as in `Objective`.
        length: tokens of a window. Default context.
        overlap: tokens that a window shares with the next one. Default 0.
        streams: of how many samples an update is made, each of which goes on where that of the update before ended.
            Default None: rows come in random order.

    Attributes:
        rows: the `Windows`.

    Raises:
        ValueError: if the stream is too short for a single window, or for so many streams.
    """

    def __init__(
        self,
        tokens: np.ndarray | Mixture,
        context: int,
        vocabulary: Vocabulary,
        length: int | None = None,
        overlap: int = 0,
        streams: int | None = None,
    ):
        super().__init__(tokens, context, vocabulary)
        length = context if length is None else length
        self.rows = _windows(tokens, length, overlap, streams)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def windows(self) -> int:
        return self.rows.count

    def batch(self, seed: int, first: int, count: int) -> Batch:
        rows, epochs, indices = self.rows.drawn(seed, first, count)
        return self.make(rows, Samples(seed, epochs, indices))

    def begins(self, first: int) -> bool:
        return self.rows.begins(first)

    def fixed(self, numbers: np.ndarray) -> Batch:
        numbers = np.asarray(numbers)
        self.check_windows(numbers)
        return self.make(self.rows.fixed(numbers), Samples(0, torch.tensor(0), torch.from_numpy(numbers)))

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        """A batch of windows.

        Args:
            rows: [B, length] int64.
            samples: whose noise the batch has.

        Returns:
            A batch, as `batch` gives it.
        """
        raise NotImplementedError

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        """What a model's `logits` are made of, which the loss does not make.

        Args:
            model: the module that the objective trains.
            batch: what `make` made.

        Returns:
            What the model's head makes of its states, `model.head.factors(model.states(…))`.
        """
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a model says of each label.

        Args:
            model: the module that the objective trains.
            batch: what `make` made.

        Returns:
            [..., V], labels' shape and the vocabulary.
        """
        return self.factors(model, batch).logits()

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return {"loss": summed_cross_entropy(self.factors(model, batch), batch["labels"])}

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        """The loss, and, by making logits, the accuracy where that is among `shares`."""
        if "accuracy" not in self.shares:
            return super().evaluate(model, batch)
        logits, labels = self.logits(model, batch), batch["labels"]
        return {"loss": summed_cross_entropy(logits, labels)}, {"accuracy": hits(logits, labels)}


def _windows(tokens: np.ndarray | Mixture, length: int, overlap: int, streams: int | None) -> Windows:
    if isinstance(tokens, Mixture):
        if streams is not None:
            raise ValueError("several sources, whose rows do not go on where others ended; give --memory 0")
        return MixedWindows(tokens, length, overlap)
    return Windows(tokens, length, overlap) if streams is None else Streams(tokens, length, overlap, streams=streams)

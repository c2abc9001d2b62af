"""What objectives share whose rows are windows of the stream, all of one length."""

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.objectives.base import Batch, Objective, Shares, Terms, Vocabulary, hits, summed_cross_entropy
from fastlm.objectives.noise import Samples
from fastlm.objectives.windows import Windows


class RowObjective(Objective):
    """An objective over windows of the stream: define `make`, which turns windows into a batch with labels, and
    `logits`, the model's answer. One whose loss is another defines `loss` and `evaluate` instead.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        length: tokens of a window. Default context.
        overlap: tokens that a window shares with the next one. Default 0.

    Attributes:
        rows: the `Windows`.

    Raises:
        ValueError: if the stream is too short for a single window.
    """

    def __init__(
        self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, length: int | None = None, overlap: int = 0
    ):
        super().__init__(tokens, context, vocabulary)
        self.rows = Windows(tokens, context if length is None else length, overlap)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def windows(self) -> int:
        return self.rows.count

    def batch(self, seed: int, first: int, count: int) -> Batch:
        rows, epochs, indices = self.rows.drawn(seed, first, count)
        return self.make(rows, Samples(seed, epochs, indices))

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

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a model says of each label.

        Args:
            model: the module that the objective trains.
            batch: what `make` made.

        Returns:
            [..., V], labels' shape and the vocabulary.
        """
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return {"loss": summed_cross_entropy(self.logits(model, batch), batch["labels"])}

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        """The loss, and the accuracy where that is among `shares`."""
        logits, labels = self.logits(model, batch), batch["labels"]
        shares = {"accuracy": hits(logits, labels)} if "accuracy" in self.shares else {}
        return {"loss": summed_cross_entropy(logits, labels)}, shares

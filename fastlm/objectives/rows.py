"""Windows of a stream, all of one length, and what objectives share whose rows they are."""

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models.heads import Factors
from fastlm.objectives import noise
from fastlm.objectives.base import Batch, Objective, Shares, Terms, hits, summed_cross_entropy
from fastlm.objectives.noise import Samples
from fastlm.objectives.vocabulary import Vocabulary


class Windows:
    """Windows of a stream. Those of an epoch do not overlap but where they are asked to, and each epoch cuts the stream
    at other places.

    Args:
        tokens: [N] ids, the stream, in which <eos> separates documents.
        length: tokens of a window.
        overlap: tokens that a window shares with the next one. Default 0.

    Attributes:
        count: windows that fit when the first starts at token 0.

    Raises:
        ValueError: if the stream is too short for a single window.
    """

    def __init__(self, tokens: np.ndarray, length: int, overlap: int = 0):
        if len(tokens) < length:
            rows = f"{length - overlap} + {overlap}" if overlap else str(length)
            raise ValueError(
                f"{len(tokens)} tokens, fewer than one row of {rows}; give more text or a smaller --context"
            )
        self.tokens, self.length, self.stride = tokens, length, length - overlap
        self.count = (len(tokens) - overlap) // self.stride
        self._order: tuple[tuple[int, int], np.ndarray] | None = None  # the last (seed, epoch) and its windows' starts

    def __len__(self) -> int:
        """Windows of an epoch."""
        return max(1, self.count - 1)  # one fewer than fit, which leaves room to shift

    def drawn(self, seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples first … first + count - 1 of the training order.

        Returns:
            (windows [count, length] int64, epochs [count], indices within their epoch [count]).
        """
        samples = [divmod(s, len(self)) for s in range(first, first + count)]
        starts = np.array([self._starts(seed, epoch)[index] for epoch, index in samples])
        epochs, indices = torch.tensor(samples).unbind(1)
        return self._cut(starts), epochs, indices

    def begins(self, first: int) -> bool:
        """Whether the window of sample `first` goes on where no other ended."""
        return True

    def fixed(self, numbers: np.ndarray) -> Tensor:
        """The windows with these numbers in the text's order, from 0 to count - 1: [n, length] int64."""
        return self._cut(numbers * self.stride)

    def _starts(self, seed: int, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != (seed, epoch):
            room = len(self.tokens) - len(self) * self.stride - (self.length - self.stride) + 1
            shift = noise.number(seed, noise.Purpose.SHIFT, epoch) % room
            self._order = (seed, epoch), shift + self.stride * self._ordered(seed, epoch)
        return self._order[1]

    def _ordered(self, seed: int, epoch: int) -> np.ndarray:
        """The order of an epoch's windows, [len(self)] int."""
        return noise.permutation(seed, epoch, len(self)).numpy()

    def _cut(self, starts: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.tokens)[starts[:, None] + np.arange(self.length)].astype(np.int64))


class Streams(Windows):
    """Windows in the order of a text, for models that remember the rows before: sample s goes on where sample
    s - streams ended, up to the epoch's end. The text falls into so many streams of one length, which begin at other
    places in each epoch, and in another order.

    Args:
        tokens, length, overlap: as in `Windows`.
        streams: how many samples an update has.

    Raises:
        ValueError: if there are fewer windows than streams.
    """

    def __init__(self, tokens: np.ndarray, length: int, overlap: int = 0, *, streams: int):
        super().__init__(tokens, length, overlap)
        self.streams, self.steps = streams, super().__len__() // streams
        if not self.steps:
            raise ValueError(
                f"{super().__len__()} rows, fewer than {streams} streams of text; give more text, a smaller --context, "
                "or a smaller --batch"
            )

    def __len__(self) -> int:
        return self.streams * self.steps

    def begins(self, first: int) -> bool:
        return first % len(self) < self.streams

    def _ordered(self, seed: int, epoch: int) -> np.ndarray:
        of_stream = self.steps * noise.permutation(seed, epoch, self.streams).numpy()
        return (of_stream + np.arange(self.steps)[:, None]).ravel()


class RowObjective(Objective):
    """An objective over windows of the stream: define `make`, which turns windows into a batch with labels, and
    `factors`, the model's answer. One whose loss is another defines `loss` and `evaluate` instead.

    Args:
        tokens, context, vocabulary: as in `Objective`.
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
        tokens: np.ndarray,
        context: int,
        vocabulary: Vocabulary,
        length: int | None = None,
        overlap: int = 0,
        streams: int | None = None,
    ):
        super().__init__(tokens, context, vocabulary)
        length = context if length is None else length
        self.rows = (
            Windows(tokens, length, overlap) if streams is None else Streams(tokens, length, overlap, streams=streams)
        )

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

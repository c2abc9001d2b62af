"""Windows of a stream, all of one length: which tokens a sample is."""

import numpy as np
import torch
from torch import Tensor

from fastlm.objectives import noise
from fastlm.objectives.samples.order import distinct, permutation


class Windows:
    """Windows of a stream. Those of an epoch do not overlap but where they are asked to, and each epoch cuts the stream
    at other places.

    Args:
        tokens: [N] ids, the stream, in which <eos> separates documents.
        length: tokens of a window.
        overlap: tokens that a window shares with the next one. Default 0.
        stream: which of several streams it is, each of which has an order of its own. Default 0.

    Attributes:
        count: windows that fit when the first starts at token 0.

    Raises:
        ValueError: if the stream is too short for a single window.
    """

    def __init__(self, tokens: np.ndarray, length: int, overlap: int = 0, stream: int = 0):
        if len(tokens) < length:
            rows = f"{length - overlap} + {overlap}" if overlap else str(length)
            raise ValueError(
                f"{len(tokens)} tokens, fewer than one row of {rows}; give more text or a smaller --context"
            )
        self.tokens, self.length, self.stride, self.stream = tokens, length, length - overlap, stream
        self.count = (len(tokens) - overlap) // self.stride

    def __len__(self) -> int:
        """Windows of an epoch."""
        return max(1, self.count - 1)  # one fewer than fit, which leaves room to shift

    def drawn(self, seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples first … first + count - 1 of the training order.

        Returns:
            (windows [count, length] int64, epochs [count], indices within their epoch [count]).
        """
        return self.numbered(seed, first + np.arange(count))

    def numbered(self, seed: int, samples: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The same of samples by their numbers, which rise."""
        epochs, indices = np.divmod(samples, len(self))
        starts = [self._starts(seed, epoch, indices[epochs == epoch]) for epoch in distinct(epochs)]
        return self._cut(np.concatenate(starts)), torch.from_numpy(epochs), torch.from_numpy(indices)

    def begins(self, first: int) -> bool:
        """Whether the window of sample `first` goes on where no other ended."""
        return True

    def fixed(self, numbers: np.ndarray) -> Tensor:
        """The windows with these numbers in the text's order, from 0 to count - 1: [n, length] int64."""
        return self._cut(numbers * self.stride)

    def _starts(self, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Where in the stream the windows at these places of an epoch begin."""
        room = len(self.tokens) - len(self) * self.stride - (self.length - self.stride) + 1
        shift = noise.number(seed, noise.Purpose.SHIFT, epoch, self.stream) % room
        return shift + self.stride * self._ordered(seed, epoch, indices)

    def _ordered(self, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        """The windows at these places of an epoch, of len(self)."""
        return permutation(seed, epoch, len(self), indices, self.stream).numpy()

    def _cut(self, starts: np.ndarray) -> Tensor:
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.length)].astype(np.int64))


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

    def _ordered(self, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        step, stream = np.divmod(indices, self.streams)
        return self.steps * permutation(seed, epoch, self.streams, stream).numpy() + step

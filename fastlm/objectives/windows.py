"""A stream of tokens cut into windows of one length: the rows of most objectives."""

import numpy as np
import torch
from torch import Tensor

from fastlm.objectives import noise


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

    def fixed(self, numbers: np.ndarray) -> Tensor:
        """The windows with these numbers in the text's order, from 0 to count - 1: [n, length] int64."""
        return self._cut(numbers * self.stride)

    def _starts(self, seed: int, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != (seed, epoch):
            room = len(self.tokens) - len(self) * self.stride - (self.length - self.stride) + 1
            shift = noise.number(seed, noise.Purpose.SHIFT, epoch) % room
            self._order = (seed, epoch), shift + self.stride * noise.permutation(seed, epoch, len(self)).numpy()
        return self._order[1]

    def _cut(self, starts: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.tokens)[starts[:, None] + np.arange(self.length)].astype(np.int64))

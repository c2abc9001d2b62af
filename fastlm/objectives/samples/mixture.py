"""Streams of several sources, and windows of them in shares that are asked for: which source a sample is of, and which
of its windows, is computed from the sample's number.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastlm.objectives.samples.windows import Windows

PERIOD = 10_000  # samples in which the shares are met exactly


class Mixture:
    """Streams of ids one after the other, as an array [N], and the share of the samples that is of each.

    Args:
        streams: arrays of ids, one each source.
        weights: as many numbers above 0, which the shares are proportional to.

    Raises:
        ValueError: for a share so small that it is none of PERIOD samples.
    """

    def __init__(self, streams: Sequence[np.ndarray], weights: Sequence[float]):
        self.streams, self.dtype = list(streams), streams[0].dtype
        self.counts = apportioned(weights)
        if not self.counts.all():
            least = min(weights) / sum(weights)
            raise ValueError(f"a share of {least:g} is less than one of {PERIOD:,} samples; give more, or 0")
        self.ends = np.cumsum([len(stream) for stream in streams])

    def __len__(self) -> int:
        return int(self.ends[-1])


def apportioned(weights: Sequence[float]) -> np.ndarray:
    """[n] int64: how many of PERIOD samples each gets, by the largest remainders (Hamilton's method)."""
    exact = PERIOD * np.asarray(weights, np.float64) / sum(weights)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]] += 1
    return counts


def interleaved(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """counts [n] → (source, place) [PERIOD] each: of which source each sample of a period is, spread evenly, and its
    place among those of that source.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((source, (place + 0.5) / counts[source]))
    return source[order], place[order]


class MixedWindows(Windows):
    """Windows of a `Mixture`, in its shares. Each source has epochs of its own: a small one is seen more often.

    Args:
        tokens: the mixture.
        length, overlap: as in `Windows`.

    Raises:
        ValueError: if a stream is too short for a single window.
    """

    def __init__(self, tokens: Mixture, length: int, overlap: int = 0):
        self.parts = [Windows(stream, length, overlap, number) for number, stream in enumerate(tokens.streams)]
        self.source, self.place = interleaved(tokens.counts)
        self.counts = tokens.counts
        self.tokens, self.length, self.stride = tokens, length, length - overlap
        sizes = [len(part) for part in self.parts]
        self.before = np.cumsum([0, *sizes[:-1]])  # samples' noise is told apart by numbers through all sources
        self.count = sum(part.count for part in self.parts)

    def __len__(self) -> int:
        """Samples in which the mixture is seen once, taken all together."""
        return sum(map(len, self.parts))

    def drawn(self, seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        period, at = np.divmod(first + np.arange(count), len(self.source))
        source = self.source[at]
        numbers = period * self.counts[source] + self.place[at]
        windows = torch.empty(count, self.length, dtype=torch.int64)
        epochs, indices = np.empty(count, np.int64), np.empty(count, np.int64)
        for which in np.unique(source):
            here = np.flatnonzero(source == which)
            rows, epoch, index = self.parts[which].numbered(seed, numbers[here])
            windows[here], epochs[here], indices[here] = rows, epoch.numpy(), index.numpy() + self.before[which]
        return windows, torch.from_numpy(epochs), torch.from_numpy(indices)

    def fixed(self, numbers: np.ndarray) -> Tensor:
        raise ValueError("windows of a mixture have no order of the text; look at each source by itself")

"""Randomness without a state: every draw is a pure function of (seed, purpose, epoch, index).

Sample order, masking and dropout then do not depend on how a run was interrupted, how many workers read the data, or
what was drawn before, and seeking costs nothing. The bits are Philox's: the seed is the key, and the counter says which
draw is meant:

    word 0: block of four draws    words 1, 2: index, low and high    word 3: purpose (8 high bits), epoch (24 low bits)
"""

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends.philox import LOW, philox

WORD = 2**32  # words are below


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes never share a counter."""

    ORDER = 0  # the order of samples in an epoch
    SHIFT = 1  # where an epoch's first window starts
    NOISE = 2  # masking and corruption of a sample
    WEIGHTS = 3  # the first weights
    DROPOUT = 4  # the seed of a step's dropout
    SAMPLE = 5  # the seed of a text the model makes
    GENERATOR = 6  # the tokens that a generator puts in
    PAIR = 7  # two texts of a row
    MASK = 8  # what the tokens of a row see
    CROP = 9  # a stretch of a row


def draw(seed: int, purpose: Purpose, epoch: int | Tensor, index: int | Tensor, n: int) -> Tensor:
    """epoch, index [...] int64 → [..., n] int64: the first n 32-bit words that belong to each pair of them."""
    epoch, index = torch.as_tensor(epoch)[..., None], torch.as_tensor(index)[..., None]
    block, last = torch.arange(-(-n // 4)), purpose << 24 | epoch & 0xFFFFFF
    words = philox((block, index & LOW, index >> 32, last), seed)
    return torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :n]


class Samples(NamedTuple):
    """Which samples' noise is meant.

    Args:
        seed: of the run; 0 for held-out text.
        epochs: [B] int64, or [] for one.
        indices: [B] int64, within their epoch.
    """

    seed: int
    epochs: Tensor
    indices: Tensor

    def draw(self, n: int, purpose: Purpose = Purpose.NOISE) -> Tensor:
        """[B, n] int64: n 32-bit words of each sample."""
        return draw(self.seed, purpose, self.epochs, self.indices, n)


@lru_cache(maxsize=256)
def number(seed: int, purpose: Purpose, epoch: int, index: int = 0) -> int:
    """One 63-bit integer: a seed for another generator, or by `%` a number below a bound far smaller than 2⁶³."""
    low, high = draw(seed, purpose, epoch, index, 2).tolist()
    return (high << 32 | low) >> 1


def pick(words: Tensor, weights: list[float]) -> Tensor:
    """32-bit words → as many indices, each with p ∝ its weight."""
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(ends / ends[-1], words.double() / WORD, right=True)


def ranked(words: Tensor, among: Tensor) -> Tensor:
    """[B, L] int64: the places of those tokens that are `among`, [B, L] bool, in the order of their 32-bit words; the
    others come after them.
    """
    return words.expand_as(among).masked_fill(~among, WORD).argsort(dim=-1, stable=True).argsort(-1)


def choose(logits: Tensor, words: Tensor) -> Tensor:
    """One class of each distribution: logits [..., V], words [...] 32-bit → [...] int64, by softmax(logits).

    The word says where on the cumulative distribution; Gumbel noise would choose alike, and take V words.
    """
    sums = logits.float().softmax(-1).cumsum(-1)
    total = sums[..., -1:]
    at = torch.minimum(words[..., None] / WORD * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, at, right=True).squeeze(-1)

"""The order of samples, computed by index: the i-th of an epoch costs the same time and no memory, be there a thousand
of them or a billion.

A Feistel network over pairs of numbers below `side` permutes side² of them, whatever its rounds mix in (Luby & Rackoff
1988, over any numbers as in Black & Rogaway 2002, "Ciphers with arbitrary finite domains", sec. 5). With side = ⌈√n⌉ it
permutes hardly more than n; what it sends beyond n goes through again until it comes back (their sec. 4, cycle
walking), so that the n are permuted among themselves. A round mixes by the finalizer of SplitMix64 (Steele, Lea & Flood
2014), under a key of its own from Philox. Of an odd side every round is an even permutation; half of all orders
exchange two samples besides, so that odd ones come as often.
"""

from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from fastlm.backends.splitmix import mixed
from fastlm.objectives.noise.draws import Purpose, Samples, draw

GROUP = 50  # batches whose samples are sorted together
ROUNDS = 16  # from which on every order of a few samples comes equally often


def permutation(seed: int, epoch: int, n: int, indices: np.ndarray | None = None, stream: int = 0) -> Tensor:
    """The order of n samples in an epoch, or some of it.

    Args:
        seed: of the order.
        epoch: which one; each has an order of its own.
        n: how many samples, below 2⁶³.
        indices: [B] int, the places of which the samples are asked for, from 0 to n - 1. Default all, in order.
        stream: which of several orders of one epoch. Default 0.

    Returns:
        [B] int64: the samples there.
    """
    at = np.arange(n, dtype=np.uint64) if indices is None else np.asarray(indices).astype(np.uint64)
    side, (exchange, *keys) = np.uint64(isqrt(max(n - 1, 0)) + 1), _keys(seed, epoch, stream)
    at = _network(at, side, keys)
    beyond = np.flatnonzero(at >= n)
    while len(beyond):
        at[beyond] = _network(at[beyond], side, keys)
        beyond = beyond[at[beyond] >= n]
    if n > 1 and exchange % 2:
        at[at < 2] ^= np.uint64(1)
    return torch.from_numpy(at.astype(np.int64))


class Order:
    """The order of n samples that are drawn as they are: each epoch is all of them, in an order of its own."""

    def __init__(self, n: int):
        self.n = n

    def of(self, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
        """[B] int64: the samples at these places of an epoch, [B] int."""
        return permutation(seed, epoch, self.n, indices)

    def drawn(self, seed: int, first: int, count: int) -> tuple[Tensor, Samples]:
        """[count] int64: the numbers of samples first … first + count - 1 of the training order; and whose noise they
        have.
        """
        epochs, indices = np.divmod(first + np.arange(count), self.n)
        numbers = torch.cat([self.of(seed, epoch, indices[epochs == epoch]) for epoch in distinct(epochs)])
        return numbers, Samples(seed, torch.from_numpy(epochs), torch.from_numpy(indices))


class ByLength(Order):
    """The order of samples of which those of a batch are about as long as one another, so that little of it is padding.

    An epoch's random order is cut into groups of GROUP batches. Each is sorted, the longest first, and cut into
    batches; those of all groups come in a random order of their own (Ott et al. 2019, "fairseq", sec. 3). What the last
    batch of an epoch lacks is taken from the next one.

    Args:
        lengths: [n] int, of each sample.
        batch: how many samples a batch has; the first begins with sample 0 of the training order.
    """

    def __init__(self, lengths: np.ndarray, batch: int):
        super().__init__(len(lengths))
        self.lengths, self.batch, self._made = lengths, batch, lru_cache(maxsize=2)(self._epoch)

    def of(self, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
        return self._made(seed, epoch)[torch.from_numpy(indices)]

    def _epoch(self, seed: int, epoch: int) -> Tensor:
        random = permutation(seed, epoch, self.n).numpy()
        lacks = min(-epoch * self.n % self.batch, self.n)  # by the last batch of the epoch before
        group = np.arange(self.n - lacks) // (GROUP * self.batch)
        by_length = random[lacks:][np.lexsort((-self.lengths[random[lacks:]], group))]
        whole = len(by_length) // self.batch
        batches = by_length[: whole * self.batch].reshape(whole, self.batch)[permutation(seed, epoch, whole, stream=1)]
        return torch.from_numpy(np.concatenate((random[:lacks], batches.ravel(), by_length[whole * self.batch :])))


def micro_batches(lengths: np.ndarray, most: int, world: int = 1) -> list[np.ndarray]:
    """Samples that learn together, cut into micro-batches of about one length, the longest first.

    Args:
        lengths: [n] int, of each; n a multiple of world.
        most: padded tokens of a micro-batch in each process, as many as the longest sample has or more.
        world: how many processes there are, of which each takes the same number of samples. Default 1.

    Returns:
        [B] int64 of each micro-batch, which samples; the process of rank r takes every world-th from r on.
    """
    by_length, made = np.argsort(-lengths, kind="stable"), []
    while len(by_length):
        rows = max(1, most // lengths[by_length[0]]) * world
        made.append(by_length[:rows])
        by_length = by_length[rows:]
    return made


def distinct(epochs: np.ndarray) -> list[int]:
    """The epochs of consecutive samples, each once, in order."""
    return list(range(epochs[0], epochs[-1] + 1)) if len(epochs) else []


@lru_cache(maxsize=256)
def _keys(seed: int, epoch: int, stream: int) -> list[np.uint64]:
    low, high = draw(seed, Purpose.ORDER, epoch, stream, 2 + 2 * ROUNDS).numpy().astype(np.uint64).reshape(-1, 2).T
    return list(high << np.uint64(32) | low)


def _network(x: np.ndarray, side: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    """x [B] uint64 below side² → as many, no two alike."""
    left, right = np.divmod(x, side)
    for key in keys:
        left, right = right, (left + mixed(right + key) % side) % side
    return left * side + right

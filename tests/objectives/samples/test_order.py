"""The order of samples: a permutation, computed by index, of any number of them, as good as one drawn evenly."""

import tracemalloc
from collections import Counter
from math import factorial

import numpy as np
import pytest
import torch

from fastlm.objectives.samples import ByLength, Order, Windows, micro_batches, order, permutation

BILLION = 10**9


@pytest.mark.parametrize("sizes", (range(0, 130), (255, 256, 257, 999, 1000, 1001, 65_536, 65_537)))
def test_it_is_a_permutation(sizes):
    for n in sizes:
        for epoch in range(3):
            assert torch.equal(permutation(1, epoch, n).sort().values, torch.arange(n))


@pytest.mark.parametrize("n, each", ((2, 100), (3, 100), (4, 40), (5, 10)))
def test_every_permutation_comes_equally_often(n, each, monkeypatch):
    """χ² over all n! of them, within five standard deviations of its mean. Keys are NumPy's, which has them sooner."""
    cells, keys = factorial(n), np.random.default_rng(0)
    drawn = lambda *name: list(keys.integers(0, 2**64, 1 + order.ROUNDS, np.uint64))
    monkeypatch.setattr(order, "_keys", drawn)
    seen = Counter(tuple(permutation(3, epoch, n).tolist()) for epoch in range(each * cells))
    counts = np.array([*seen.values()] + [0] * (cells - len(seen)))
    statistic = ((counts - each) ** 2 / each).sum()
    assert abs(statistic - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("n", (100_003, BILLION + 7, 2**40))
def test_a_large_one_looks_drawn(n):
    """Places, displacements and steps between neighbours are even; neighbours, and one place in two epochs, are not
    correlated. Each count within five standard deviations.
    """
    some = 2**16
    first = permutation(0, 0, n, np.arange(some)).numpy()
    second = permutation(0, 1, n, np.arange(some)).numpy()
    for numbers in (first, (first - np.arange(some)) % n, np.diff(first) % n, (second - first) % n):
        counts = np.bincount(numbers * 64 // n, minlength=64)
        even = len(numbers) / 64
        assert abs(((counts - even) ** 2 / even).sum() - 63) < 5 * (2 * 63) ** 0.5
    for x, y in ((first[:-1], first[1:]), (first[:-2], first[2:]), (first, second), (first, np.arange(some))):
        x = x[: len(y)]
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / len(x) ** 0.5


def test_any_part_is_the_wholes():
    whole = permutation(5, 2, 1000)
    for indices in (np.array([999]), np.array([3, 1, 2]), np.arange(500, 600)):
        assert torch.equal(permutation(5, 2, 1000, indices), whole[indices])


def test_orders_differ_by_seed_epoch_and_stream():
    names = [(seed, epoch, stream) for seed in range(3) for epoch in range(3) for stream in range(3)]
    orders = {tuple(permutation(seed, epoch, 50, stream=stream).tolist()) for seed, epoch, stream in names}
    assert len(orders) == 27


def test_samples_are_numbered_through_all_epochs():
    order = Order(10)
    numbers, samples = order.drawn(1, 7, 16)
    assert samples.epochs.tolist() == [0] * 3 + [1] * 10 + [2] * 3
    assert samples.indices.tolist() == [7, 8, 9, *range(10), 0, 1, 2]
    assert numbers[3:13].tolist() == permutation(1, 1, 10).tolist()


class Endless:
    """A stream of more tokens than a machine holds: token i is i modulo 65,536."""

    def __len__(self):
        return 128 * BILLION

    def __getitem__(self, at):
        return (at % 65_536).astype(np.uint16)


def test_a_billion_windows_take_no_memory():
    rows = Windows(Endless(), 129, overlap=1)
    assert len(rows) == BILLION - 2
    tracemalloc.start()
    found, _, _ = rows.drawn(0, 3 * BILLION + 12_345, 8)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (8, 129) and (found.diff() % 65_536 == 1).all() and most < 1e6


def test_order_never_changes():
    """A run begun with one version of fastlm must see the same samples when another resumes it."""
    assert permutation(0, 0, 8).tolist() == [3, 0, 1, 5, 7, 2, 4, 6]


def lengths(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, n)


@pytest.mark.parametrize("n", (1, 3, 4, 7, 1000, 1003))
def test_samples_of_a_length_come_together_and_each_once(n):
    order = ByLength(lengths(n), 4)
    numbers, samples = order.drawn(1, 0, 5 * n)
    assert samples.indices.tolist() == 5 * list(range(n))
    for epoch in numbers.view(5, n):
        assert torch.equal(epoch.sort().values, torch.arange(n))
    assert torch.equal(order.drawn(1, 4 * n - 2, 3)[0], numbers[4 * n - 2 : 4 * n + 1])


def test_batches_hold_little_padding_in_every_epoch():
    """1,003 samples in batches of 4: every epoch begins inside a batch of the one before."""
    of, batch = lengths(1003), 4

    def padding(order: Order) -> np.ndarray:
        """[batches]: the share of each that is padding."""
        rows = of[order.drawn(1, 0, 4 * len(of))[0].numpy()].reshape(-1, batch)
        return 1 - rows.mean(1) / rows.max(1)

    assert padding(Order(len(of))).mean() > 0.3
    shares = padding(ByLength(of, batch))
    assert shares.mean() < 0.05


@pytest.mark.parametrize("world", (1, 2, 4))
def test_micro_batches_keep_to_a_budget_and_have_each_sample_once(world):
    of, most = lengths(64), 4000
    cut = micro_batches(of, most, world)
    assert sorted(np.concatenate(cut).tolist()) == list(range(64)) and len(cut) > 64 * 500 // (world * most)
    parts = [[of[some[rank::world]] for some in cut] for rank in range(world)]
    for part in parts:
        assert [len(some) for some in part] == [len(some) for some in parts[0]]
        assert all(len(some) and len(some) * some.max() <= most for some in part)
    longest = [some.max() for some in parts[0]]
    assert longest == sorted(longest, reverse=True) and longest[0] == of.max()
    padded = sum(len(some) * some.max() for part in parts for some in part)
    assert padded < 0.7 * 64 * of.max()  # of one batch of all
    assert [some.tolist() for some in micro_batches(np.array([5, 9, 5]), 4)] == [[1], [0], [2]]


def test_batches_of_a_length_come_in_random_order():
    of = lengths(10_000)
    order = ByLength(of, 4)
    first = of[order.drawn(1, 0, 10_000)[0].numpy()].reshape(-1, 4).max(1)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / len(first) ** 0.5
    assert not torch.equal(order.drawn(1, 0, 100)[0], order.drawn(2, 0, 100)[0])
    assert not torch.equal(order.drawn(1, 0, 100)[0], order.drawn(1, 10_000, 100)[0])

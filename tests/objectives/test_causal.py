"""Batches of the next token: a function of their number, and every token once an epoch."""

import random

import numpy as np
import pytest

from fastlm.objectives import Causal, Vocabulary

VOCABULARY = Vocabulary(2000)


def test_an_epoch_sees_each_window_once_and_the_next_ones_elsewhere():
    ids = np.arange(1000)
    task = Causal(ids, 16, VOCABULARY)
    starts = [task.batch(7, epoch * len(task), len(task))["inputs"][:, 0].sort().values for epoch in range(3)]
    assert all((s.diff() == 16).all() for s in starts)
    assert len({s[0].item() for s in starts}) > 1


def test_labels_are_one_ahead_and_the_last_token_is_reached():
    task = Causal(np.arange(16 * 5 + 1), 16, VOCABULARY)
    batch = task.fixed(np.arange(task.windows))
    assert (batch["labels"] == batch["inputs"] + 1).all() and batch["labels"].max() == 16 * 5
    assert task.targets(batch) == {"loss": 16 * 5}


def test_random_windows_stay_inside():
    draw = random.Random(0)
    for _ in range(200):
        context = draw.randint(1, 20)
        n = context + draw.randint(1, 100)
        task = Causal(np.arange(n), context, VOCABULARY)
        batch = task.batch(draw.randint(0, 9), draw.randint(0, 99), 5)
        assert batch["labels"].max() < n and batch["inputs"].min() >= 0


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="smaller --context"):
        Causal(np.arange(16), 16, VOCABULARY)

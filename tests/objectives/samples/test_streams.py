"""Windows as streams: each row goes on where that of the update before ended, and an epoch sees each window once."""

import numpy as np
import pytest

from fastlm.objectives import Causal, Vocabulary
from fastlm.objectives.samples import Streams

VOCABULARY = Vocabulary(2000)


def test_each_sample_goes_on_where_the_update_before_ended():
    task = Causal(np.arange(16 * 50), 16, VOCABULARY, streams=3)
    assert len(task) == 3 * 16
    for epoch in range(3):
        batch = task.batch(7, epoch * len(task), len(task))
        begins, ends = batch["inputs"][:, 0], batch["labels"][:, -1]
        assert (begins[3:] == ends[:-3]).all()
        assert (begins.sort().values.diff() == 16).all()
    assert [task.begins(first) for first in range(0, 2 * len(task), 3)] == 2 * ([True] + 15 * [False])


def test_epochs_begin_at_other_places_and_streams_come_in_another_order():
    task = Causal(np.arange(16 * 50), 16, VOCABULARY, streams=3)
    firsts = [tuple(task.batch(0, epoch * len(task), 3)["inputs"][:, 0].tolist()) for epoch in range(8)]
    assert len({min(first) for first in firsts}) > 4
    assert len({tuple(np.argsort(first)) for first in firsts}) > 1


def test_a_batch_is_a_function_of_seed_and_numbers():
    one, other = (Causal(np.arange(900), 16, VOCABULARY, streams=4) for _ in range(2))
    whole = one.batch(3, 0, 200)["inputs"]
    for first in (150, 4, 61):
        assert (other.batch(3, first, 4)["inputs"] == whole[first : first + 4]).all()


def test_windows_that_overlap_are_streams_too():
    streams = Streams(np.arange(200), 8, 5, streams=4)
    rows, _, _ = streams.drawn(0, 0, len(streams))
    assert (rows[4:, 0] == rows[:-4, 0] + 3).all()


def test_fewer_windows_than_streams_are_refused():
    with pytest.raises(ValueError, match="4 rows, fewer than 5 streams of text; give more text, a smaller --context"):
        Causal(np.arange(16 * 5 + 1), 16, VOCABULARY, streams=5)

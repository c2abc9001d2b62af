"""Permutation language modelling: how many targets, where they lie, and who sees whom."""

import numpy as np
import pytest
import torch

from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, Permutation, Vocabulary
from fastlm.objectives.noise import Samples

VOCABULARY = Vocabulary(100)
STREAM = np.random.default_rng(0).integers(5, 100, 40_000).astype(np.uint16)
STREAM[::37] = VOCABULARY.eos


def model(o, context):
    torch.manual_seed(0)
    return Transformer(preset("xlnet", vocab_size=100, dim=32, layers=2, heads=2, context=context, **o.shape)).eval()


@pytest.mark.parametrize("context, count", [(512, 85), (64, 11), (16, 3), (4, 1)])
def test_a_sixth_is_predicted(context, count):
    o = Permutation(STREAM, context, VOCABULARY)
    batch = o.batch(0, 0, 8)
    assert batch["places"].shape == (8, count) and o.targets(batch) == {"loss": 8 * count}
    assert (batch["places"].diff() > 0).all() and (batch["labels"] >= VOCABULARY.specials).all()
    assert torch.equal(batch["inputs"].gather(1, batch["places"]), batch["labels"])
    assert torch.equal(batch["inputs"], o.rows.drawn(0, 0, 8)[0])
    ranks = batch["ranks"].gather(1, batch["places"]).sort(-1).values
    assert torch.equal(ranks, torch.arange(count).expand(8, -1))
    assert ((batch["ranks"] >= 0).sum(1) == count).all() and (batch["ranks"] >= -1).all()


def test_spans_lie_evenly_in_contexts_of_six_times_their_length():
    o = Permutation(STREAM, 512, VOCABULARY)
    lengths, starts = Samples(0, torch.tensor(0), torch.arange(4000)).draw(172).split(86, -1)
    spans = o._spans(lengths, starts)
    assert abs(spans.float().mean() - 1 / 6) < 0.002
    # of the first context, of n · 6 tokens: p(n) ∝ 1/n, and a span of one token stands anywhere in 6
    first = spans[:, :6].float().mean(0)
    one = 1 / sum(1 / n for n in range(1, 6))
    expected = [one / 6 + sum(one / n * min(j + 1, n) / (5 * n + 1) for n in range(2, 6)) for j in range(6)]
    torch.testing.assert_close(first, torch.tensor(expected), rtol=0, atol=0.02)


def test_orders_are_even():
    o = Permutation(STREAM, 16, VOCABULARY)
    batch = o.batch(0, 0, 2000)
    orders = (batch["ranks"].gather(1, batch["places"]) * torch.tensor([9, 3, 1])).sum(1)
    counts = torch.bincount(orders)
    assert (counts > 0).sum() == 6 and (counts[counts > 0] / 2000 - 1 / 6).abs().max() < 0.03


def test_a_target_is_predicted_without_itself_and_those_after_it():
    o = Permutation(STREAM, 24, VOCABULARY)
    net, batch = model(o, 24), o.batch(0, 0, 1)
    before = o.logits(net, batch)[0]
    places, ranks = batch["places"][0], batch["ranks"][0]
    for place in range(24):
        other = batch | {"inputs": batch["inputs"].clone()}
        other["inputs"][0, place] = 5 + (other["inputs"][0, place] + 1) % 90
        moved = (o.logits(net, other)[0] != before).any(-1)
        assert torch.equal(moved, ranks[places] > ranks[place]), place


def test_rows_of_streams_go_on_where_others_ended():
    o = Permutation(np.arange(100, 1600).astype(np.uint16), 20, Vocabulary(2000), streams=3)
    batch = o.batch(1, 0, len(o))
    assert (batch["inputs"][3:, 0] == batch["inputs"][:-3, -1] + 1).all()
    assert [o.begins(first) for first in (0, 3, len(o))] == [True, False, True]
    assert torch.equal(batch["inputs"].gather(1, batch["places"]), batch["labels"])


def test_rows_of_specials_have_fewer_targets():
    stream = np.full(1000, VOCABULARY.eos, np.uint16)
    stream[::20] = 7
    batch = Permutation(stream, 40, VOCABULARY).batch(0, 0, 8)
    assert set(batch["labels"].unique().tolist()) == {7, IGNORED} and ((batch["labels"] == 7).sum(1) == 2).all()


def test_too_little_is_refused():
    with pytest.raises(ValueError, match=r"rows of 2, of which 1/6 is not one target; give a larger --context"):
        Permutation(STREAM, 2, VOCABULARY)
    with pytest.raises(ValueError, match="'learned' is added to embeddings; give one that acts in attention"):
        preset("bert", two_streams=True)

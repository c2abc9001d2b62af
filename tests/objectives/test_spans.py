"""Span corruption against T5's published lengths, its noise's statistics, and that a row can be put together again."""

import numpy as np
import pytest
import torch

from fastlm.objectives import SpanCorruption, Vocabulary
from fastlm.objectives.noise import Samples
from fastlm.objectives.spans import SENTINELS, raw_length, span_lengths

VOCABULARY = Vocabulary(500)
STREAM = np.random.default_rng(0).integers(5, 500, 100_000).astype(np.uint16)
LENGTHS = [(64, 70, 14), (128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229)]  # T5's code


@pytest.mark.parametrize("context, raw, labels", LENGTHS)
def test_lengths_are_t5s(context, raw, labels):
    assert raw_length(context, 0.15, 3.0) == raw
    assert span_lengths(raw, 0.15, 3.0)[2] == labels
    if context <= 512:
        batch = SpanCorruption(STREAM, context, VOCABULARY).batch(0, 0, 3)
        assert batch["inputs"].shape == (3, context) and batch["labels"].shape == (3, labels)


def put_together(inputs, labels):
    """The text again: each sentinel in the inputs replaced by what follows it in the labels."""
    spans, sentinel = {}, None
    for token in labels[:-1]:
        if token >= VOCABULARY.size:
            sentinel = token
            spans[sentinel] = []
        else:
            spans[sentinel].append(token)
    assert labels[-1] == inputs[-1] == VOCABULARY.eos
    assert list(spans) == [VOCABULARY.size + SENTINELS - 1 - k for k in range(len(spans))]
    assert [token for token in inputs if token >= VOCABULARY.size] == list(spans)
    return [t for token in inputs[:-1] for t in (spans[token] if token >= VOCABULARY.size else [token])]


def test_a_row_can_be_put_together_again():
    o = SpanCorruption(STREAM, 128, VOCABULARY)
    batch, rows = o.batch(0, 0, 64), o.rows.drawn(0, 0, 64)[0]
    for inputs, labels, row in zip(batch["inputs"].tolist(), batch["labels"].tolist(), rows.tolist(), strict=True):
        assert put_together(inputs, labels) == row
    shifted = torch.cat((torch.zeros(64, 1, dtype=torch.long), batch["labels"][:, :-1]), 1)
    assert torch.equal(batch["decoder_inputs"], shifted)


def test_the_first_token_stays_the_last_goes_and_the_rest_is_even():
    o = SpanCorruption(STREAM, 64, VOCABULARY)
    hidden, starts = o._noise(Samples(0, torch.tensor(0), torch.arange(20_000)))
    assert not hidden[:, 0].any() and hidden[:, -1].all()
    assert (hidden.sum(1) == 10).all() and (starts.sum(1) == 3).all()
    inside = hidden.float().mean(0)[10:-10]  # a composition is even but near its ends
    assert (inside - inside.mean()).abs().max() < 0.02


def test_span_lengths_are_even_over_compositions():
    """10 tokens in 3 parts: 36 ways, each as likely, so P(first part = m) = (9 - m) / 36."""
    o = SpanCorruption(STREAM, 64, VOCABULARY)
    hidden, starts = o._noise(Samples(0, torch.tensor(0), torch.arange(20_000)))
    first = (hidden & (starts.long().cumsum(1) == 1)).sum(1)
    shares = torch.bincount(first, minlength=9)[1:9] / len(first)
    torch.testing.assert_close(shares, torch.arange(8, 0, -1) / 36, rtol=0, atol=0.012)


def test_impossible_rows_are_refused():
    with pytest.raises(ValueError, match="rows of 2048, which have 114 spans, and there are 100 sentinels"):
        SpanCorruption(STREAM, 2048, VOCABULARY)
    with pytest.raises(ValueError, match="rows of 2, fewer than a token, a sentinel and <eos>"):
        SpanCorruption(STREAM, 2, VOCABULARY)
    with pytest.raises(ValueError, match="30 tokens, fewer than one row of 70"):
        SpanCorruption(STREAM[:30], 64, VOCABULARY)

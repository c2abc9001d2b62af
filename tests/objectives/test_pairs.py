"""Pairs of texts: how rows are laid out, which texts belong together, and what each term counts."""

import numpy as np
import pytest
import torch

from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, NextSentence, SentenceOrder, Vocabulary
from fastlm.objectives.noise.sentences import Sentences

SIZE, STOP = 5000, 10
EACH = torch.ones(SIZE, dtype=torch.bool)
WORDS = Vocabulary(SIZE, begins_word=EACH, ends_sentence=torch.arange(SIZE) == STOP, ends_line=~EACH)


def stream():
    """Documents of 300, 40, 7, 150 and 500 tokens, no token twice but stops; a sentence is 6 words long."""
    ids, next_id = [], 20
    for length in (300, 40, 7, 150, 500):
        for i in range(length):
            ids.append(STOP if i % 7 == 6 else next_id)
            next_id += 1
        ids.append(WORDS.eos)
    return np.array(ids, np.uint16)


STREAM = stream()
TEXT = STREAM.tolist()
DOCUMENT = {token: sum(end < i for end in range(len(TEXT)) if TEXT[end] == WORDS.eos) for i, token in enumerate(TEXT)}


def texts_of(batch):
    """(A, B, label) of each row, with hidden tokens put back."""
    there = batch["inputs"].gather(1, batch["places"])
    there = torch.where(batch["labels"] == IGNORED, there, batch["labels"])
    rows = batch["inputs"].scatter(1, batch["places"], there)
    columns = (rows, batch["types"], batch["lengths"], batch["pairs"])
    for row, types, length, label in zip(*(column.tolist() for column in columns), strict=True):
        first, last = row.index(WORDS.eos), length - 1
        assert row[0] == WORDS.begin and row[last] == WORDS.eos and row.count(WORDS.eos) == 2
        assert set(row[length:]) <= {WORDS.pad}
        assert types == [0] * (first + 1) + [1] * (last - first) + [0] * (len(row) - length)
        yield row[1:first], row[first + 1 : last], label


def begin_of(text):
    """Where a text stands in the stream."""
    at = next(i for i, token in enumerate(text) if token != STOP)
    return TEXT.index(text[at]) - at


def runs_on(a, b):
    """Whether B is what follows A in the stream."""
    at = begin_of(b)
    return TEXT[at - len(a) : at] == a and TEXT[at : at + len(b)] == b


def documents_of(text):
    return {DOCUMENT[token] for token in text if token != STOP}


def test_next_sentences():
    o = NextSentence(STREAM, 64, WORDS)
    labels = []
    for a, b, label in texts_of(o.batch(0, 0, 600)):
        labels.append(label)
        assert a and b and len(a) + len(b) <= 61 and len(documents_of(a)) <= 1 == len(documents_of(b))
        assert runs_on(a, b) if label == 0 else documents_of(a) != documents_of(b)
        assert TEXT[begin_of(b) :][: len(b)] == b
    assert abs(np.mean(labels) - 0.5) < 0.06


def test_sentence_order():
    o = SentenceOrder(STREAM, 64, WORDS)
    labels = []
    for a, b, label in texts_of(o.batch(0, 0, 600)):
        labels.append(label)
        assert runs_on(*((a, b) if label == 0 else (b, a)))
    assert abs(np.mean(labels) - 0.5) < 0.06


def test_an_epoch_sees_each_run_once_and_runs_hold_the_text():
    o = SentenceOrder(STREAM, 64, WORDS)
    seen = [t for a, b, _ in texts_of(o.batch(5, 0, len(o))) for t in (*a, *b) if t != STOP]
    alone = 6  # words of the document of one sentence
    assert len(seen) == len(set(seen)) == (STREAM >= 20).sum() - alone
    held = [t for a, b, _ in texts_of(o.fixed(np.arange(o.windows))) for t in (*a, *b) if t != STOP]
    assert sorted(held) == sorted(seen)


@pytest.mark.parametrize("objective", [NextSentence, SentenceOrder])
def test_where_texts_begin_and_end_tells_nothing(objective):
    """All are whole sentences, of either label."""
    for text in (text for a, b, _ in texts_of(objective(STREAM, 64, WORDS).batch(0, 0, 300)) for text in (a, b)):
        begin = begin_of(text)
        assert begin == 0 or TEXT[begin - 1] in (STOP, WORDS.eos)
        assert text[-1] == STOP or TEXT[begin + len(text)] == WORDS.eos


def test_a_sentence_that_does_not_fit_is_left_out():
    stream = STREAM.copy()
    stream[7:300][stream[7:300] == STOP] = 4990  # sentences of 7 and of 293 tokens
    o = SentenceOrder(stream, 64, WORDS)
    assert o.pieces.begins.min() == 301
    with pytest.raises(ValueError, match="0 documents with two sentences that fit into 61 tokens together"):
        SentenceOrder(stream[:301], 64, WORDS)


def test_sentences_are_found_whatever_the_block(monkeypatch):
    whole = Sentences(STREAM, WORDS)
    assert len(whole.documents) == 5 and (STREAM[whole.begins] != WORDS.eos).all()
    before = STREAM[whole.begins[1:] - 1]
    assert set(before.tolist()) == {STOP, WORDS.eos}
    monkeypatch.setattr(Sentences, "BLOCK", 13)
    parts = Sentences(STREAM, WORDS)
    for name in ("begins", "documents", "of_document"):
        assert (getattr(whole, name) == getattr(parts, name)).all()


@pytest.mark.parametrize("objective", [NextSentence, SentenceOrder])
def test_each_term_has_its_count(objective):
    torch.manual_seed(0)
    o = objective(STREAM, 64, WORDS)
    model = Transformer(preset("bert", vocab_size=SIZE, dim=32, layers=1, heads=2, context=64)).eval()
    batch = o.batch(0, 0, 8)
    counts = o.targets(batch)
    assert counts[o.name] == 8 and counts["mlm"] == (batch["labels"] != IGNORED).sum() <= 8 * 10
    budget = (0.15 * batch["lengths"]).round().clamp(min=1)
    assert torch.equal((batch["labels"] != IGNORED).sum(1), budget.long())
    _, shares = o.evaluate(model, batch)
    assert tuple(shares) == ("accuracy", f"{o.name}_accuracy") and shares[o.shares[1]][1] == 8


def test_what_a_text_lacks_is_said():
    one = STREAM[:301]
    with pytest.raises(ValueError, match="1 document, and half of the pairs need another one; give 2 or more"):
        NextSentence(one, 64, WORDS)
    SentenceOrder(one, 64, WORDS)
    with pytest.raises(ValueError, match="0 documents with two sentences that fit into 61 tokens"):
        SentenceOrder(np.full(500, 20, np.uint16), 64, WORDS)
    with pytest.raises(ValueError, match="the vocabulary lacks begins_word"):
        SentenceOrder(STREAM, 64, Vocabulary(SIZE))

"""The tokenizer: that every text survives it, and what it learns from."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.trainer.data import tokenizer


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_text_survives_the_round_trip(some):
    encoder = round_trip_tokenizer()
    for written in (some, f"<eos>{some}<pad>"):
        ids = encoder.encode(written).ids
        assert encoder.decode(ids) == written and min(ids, default=9) >= len(tokenizer.SPECIALS)


def round_trip_tokenizer(made=[]):  # noqa: B006 (one for all examples)
    if not made:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            tokenizer.train(iter(["def f(x):\n    return x <eos>\n" * 20]), 280, path)
            made.append(tokenizer.load_tokenizer(path))
    return made[0]


TELLING = st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\r\x1c\u3000'st1.")


@given(st.lists(st.text(TELLING, max_size=9), max_size=20), st.integers(4, 30))
@settings(max_examples=200, deadline=None)
def test_pieces_have_the_ids_of_their_text(words, longest):
    """Wherever a piece ends before white space; else only the text is the same."""
    some = " ".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", longest)
        cut = list(tokenizer.pieces(some))
    assert "".join(cut) == some and all(0 < len(piece) <= longest for piece in cut[:-1])
    if all(len(piece) < longest for piece in cut[:-1]):
        ids = [i for each in round_trip_tokenizer().encode_batch_fast(cut) for i in each.ids]
        assert ids == round_trip_tokenizer().encode(some).ids


def test_a_small_text_is_learned_from_whole():
    assert tokenizer.learned_share(iter(()), tokenizer.LEARNED) == 1.0
    assert list(tokenizer.evenly(iter(["one two", "", "three"]), 1.0)) == ["one two", "", "three"]


def test_a_large_text_is_learned_from_evenly():
    some = [f"{i:04} {'x' * (i % 50)}" for i in range(10_000)]
    sizes = [sum(map(len, tokenizer.evenly(iter(part), 0.3))) / sum(map(len, part)) for part in (some, some[5000:])]
    assert all(0.29 < size <= 0.3 for size in sizes)
    quarters = [sum(int(piece[:4]) // 2500 == i for piece in tokenizer.evenly(iter(some), 0.3)) for i in range(4)]
    assert min(quarters) > 0.9 * max(quarters)


def test_different_words_are_learned_from_as_far_as_they_fit(monkeypatch):
    monkeypatch.setattr(tokenizer, "LEARNED", 10_000)
    monkeypatch.setattr(tokenizer, "DISTINCT", 1_000)
    draw = random.Random(0)
    different = ["".join(draw.choices("abcdef", k=100)) for _ in range(200)]
    assert tokenizer.learned_share(iter(different), 20_000) == pytest.approx(0.05)  # of 10,000 different bytes
    assert tokenizer.learned_share(iter(["the same words"] * 2000), 28_000) == pytest.approx(10 / 28)


def test_a_text_without_a_space_takes_no_longer(tmp_path):
    """Whole, a word of 200 kB takes 35 seconds, and a larger one the square of that."""
    begun = time.process_time()
    some = "".join(random.Random(0).choices("ACGT", k=200_000))
    tokenizer.train(iter([some]), 400, tmp_path / "tokenizer.json")
    encoder = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    size, counts = tokenizer.encode(encoder, iter([some, "", "CA"]), tmp_path / "ids")
    ids = np.fromfile(tmp_path / "ids", np.uint16)
    assert size == 200_002 and counts.sum() == len(ids) and encoder.decode(ids.tolist()) == some + "CA"
    assert ids.tolist().count(tokenizer.EOS) == 3
    assert time.process_time() - begun < 10


def test_objectives_are_told_of_words_sentences_and_lines():
    encoder = round_trip_tokenizer()
    known = tokenizer.vocabulary(encoder)
    ids = encoder.encode("def f(x):\n    return x. Who? (me)\nx.y 7").ids
    marked = lambda field: [encoder.decode([i]) for i in ids if field[i]]
    words = marked(known.begins_word)
    assert any(text.startswith(" ") for text in words) and not any(text[:1].isalnum() for text in words)
    assert marked(known.ends_sentence) == [".", "?", "."]
    assert [text.strip(" ") for text in marked(known.ends_line)] == ["\n", "\n"]
    for field in (known.begins_word, known.ends_sentence, known.ends_line):
        assert field.shape == (encoder.get_vocab_size(),) and not field[: len(tokenizer.SPECIALS)].any()

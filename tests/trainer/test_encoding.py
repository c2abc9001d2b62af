"""Ids word by word are the tokenizer's own, whatever the text."""

import random

import numpy as np
import pytest

from fastlm.trainer.data import corpus, encoding, known, splitting, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "tokenizer.json"
    tokenizer.train(iter(["the cat's café is 12 % naïve, isn't it?\n\n  yes \xa0 \xa0 \xa0 it's  "] * 20), 300, path)
    return tokenizer.load_tokenizer(path)


def same(made, texts: list[str]) -> None:
    ids, counts = tokenizer.encoder_of(made)(texts)
    found = [some.tolist() for some in np.split(ids, counts.cumsum())]
    assert found == [each.ids for each in made.encode_batch_fast(texts)] + [[]]


def split(made, text: str) -> None:
    """Words are those of the pre-tokenizer, which writes each byte as a character."""
    data = text.encode() + splitting.STOP
    found = np.diff(splitting.starts(np.frombuffer(data, np.uint8)))
    assert found.tolist() == [len(word) for word, _ in made.pre_tokenizer.pre_tokenize_str(text)], text


def test_every_character_in_every_company(made):
    characters = [chr(i) for i in range(0x3000) if splitting.common(chr(i))]
    same(made, [f"a{c}b {c}1{c}{c} '{c}s  {c} \n{c}" for c in characters])


def test_texts_of_any_characters(made):
    draw, some = random.Random(0), "ab1 2'stredvlm.\n\t é\0\xa0\x85\x1c\u2003ж中\U0001f600\u0300<eos>"
    same(made, ["".join(draw.choice(some) for _ in range(draw.randrange(40))) for _ in range(2000)] + [""])
    for _ in range(2000):
        split(made, "".join(draw.choice("'stredvlm a.\n\xa0") for _ in range(draw.randrange(12))))


def test_words_of_any_length(made):
    """Those of up to 15 bytes are found by them, and longer ones otherwise."""
    same(made, [f"{'a' * n} {'é' * n}{' ' * n}. {'0' * n}\0" for n in range(40)] * 2)
    same(made, [" \xa0 \xa0x", " \xa0 x", "x  \xa0", "\xa0 \xa0"])
    same(made, ["\0", "\0\0", "\0\0\0", "a", "a\0", "\0a"] * 2)


def test_python_s_own_sources(made):
    _, files = corpus.default_files()
    same(made, [path.read_text(errors="replace")[:20_000] for path, _ in files[:40]])


def test_words_are_forgotten_when_they_are_too_many(made, monkeypatch):
    monkeypatch.setattr(encoding, "KEPT", 500)
    encoder = tokenizer.encoder_of(made)
    for i in range(50):
        text = f"word{i} and the cat"
        assert encoder([text])[0].tolist() == made.encode(text).ids
        assert encoder.known.size < 1500


def test_words_that_fall_together_are_told_apart(monkeypatch):
    """All at one place of the table, which grows meanwhile; what is not there is not found."""
    monkeypatch.setattr(known.Known, "_places", lambda self, keys: np.full(keys.shape[1], len(self.table) - 1))
    monkeypatch.setattr(known, "SPARSE", 100)
    table, words = known.Known(np.uint16), [f"{i}".encode() for i in range(60)]
    ask = lambda some: table.find(b"".join(some), np.cumsum([0, *map(len, some)])[:-1], np.array([*map(len, some)]))
    for at in range(0, 60, 20):
        assert (ask(words[at:]) == -1).all()
        some = words[at : at + 20]
        table.add(some, np.arange(at, at + 20, dtype=np.uint16).repeat(2), np.full(20, 2))
    assert ask(words).tolist() == list(range(60)) and len(table.table) > 1 << 12
    ids, ends = table.ids(np.array([7, 0, 59]))
    assert ids.tolist() == [7, 7, 0, 0, 59, 59] and ends.tolist() == [2, 4, 6]

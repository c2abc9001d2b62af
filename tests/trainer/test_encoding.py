"""Ids word by word are the tokenizer's own, whatever the text."""

import random
import sys

import numpy as np
import pytest

from fastlm.trainer.data import corpus, encoding, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "tokenizer.json"
    tokenizer.train(iter(["the cat's café is 12 % naïve, isn't it?\n\n  yes it's  "] * 20), 300, path)
    return tokenizer.load_tokenizer(path)


def same(made, texts: list[str]) -> None:
    found = [np.frombuffer(ids, np.uint16).tolist() for ids in tokenizer.encoder_of(made)(texts)]
    assert found == [each.ids for each in made.encode_batch_fast(texts)]


def test_every_character_in_every_company(made):
    characters = [chr(i) for i in range(0x3000) if encoding._COMMON.match(chr(i))]
    same(made, [f"a{c}b {c}1{c}{c} '{c}s  {c} \n{c}" for c in characters])


def test_texts_of_any_characters(made):
    draw, some = random.Random(0), "ab1 2'st.\n\t é\xa0\x85\x1c\u2003ж中\U0001f600\u0300<eos>"
    same(made, ["".join(draw.choice(some) for _ in range(draw.randrange(40))) for _ in range(2000)] + [""])


def test_python_s_own_sources(made):
    _, files = corpus.default_files()
    same(made, [path.read_text(errors="replace")[:20_000] for path, _ in files[:40]])


def test_words_are_forgotten_when_they_are_too_many(made, monkeypatch):
    monkeypatch.setattr(encoding, "KEPT", 500)
    encoder = tokenizer.encoder_of(made)
    for i in range(50):
        text = f"word{i} and the cat"
        assert np.frombuffer(encoder([text])[0], np.uint16).tolist() == made.encode(text).ids
    assert sum(map(sys.getsizeof, encoder.known)) < 5000

"""Text as ids, and the cache of them: nothing half-written is trusted."""

import os
import shutil

import numpy as np
import pytest

from fastlm.trainer.data import corpus, tokenizer
from fastlm.trainer.data import tokens as data
from fastlm.trainer.words import Refusal


def test_tokens(text):
    found = corpus.find((text,))
    tokens = data.tokenize(found, vocab=300)
    encoder = tokenizer.load_tokenizer(tokens.tokenizer_file)
    assert tokens.facts.vocab_size == 300 and tokens.train.dtype == np.uint16
    for side, ids in ((False, tokens.train), (True, tokens.held_out)):
        assert ids[-1] == tokenizer.EOS and encoder.decode(ids[:-1].tolist()) == "".join(found.documents(side))
    assert tokens.bytes_of()[tokens.held_out].sum() == tokens.facts.held_out_bytes
    assert 0 < tokens.bits_per_byte(tokens.facts.unigram_nats) < 8


def test_second_time_comes_from_the_cache(text):
    found = corpus.find((text,))
    assert data.tokenize(found, 300).built > 0
    assert data.tokenize(found, 300).built == 0
    assert data.tokenize(found, 290).built > 0


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", (cut, alter, os.unlink), ids=("cut", "altered", "deleted"))
@pytest.mark.parametrize("name", (*data.FILES, "facts.json"))
def test_damaged_cache_is_built_again(text, name, harm):
    found = corpus.find((text,))
    first = data.tokenize(found, 300)
    train = first.train.tolist()
    harm(first.folder / name)
    again = data.tokenize(found, 300)
    assert again.built > 0 and again.train.tolist() == train
    assert data.tokenize(found, 300).built == 0


def test_unwritable_cache_is_refused(text, monkeypatch):
    (text.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(text.parent / "file"))
    with pytest.raises(Refusal, match="set XDG_CACHE_HOME"):
        data.tokenize(corpus.find((text,)), 300)


@pytest.mark.parametrize("damaged", (False, True), ids=("there", "damaged"))
def test_of_two_builders_one_entry_stays(text, monkeypatch, damaged):
    """The other builder's entry appears while ours is being finished."""
    found = corpus.find((text,))
    folder = data.tokenize(found, 300).folder
    made = folder.with_name(".tmp-ours")
    shutil.copytree(folder, made)
    facts = data._valid_facts(made, None)
    if damaged:
        cut(folder / "train.bin")
    assert data._place(made, folder, facts, None) == facts and data._valid_facts(folder, None) == facts
    shutil.rmtree(made, ignore_errors=True)
    assert list(data.cache_folder().iterdir()) == [folder]


def test_what_dead_builders_left_goes_after_a_day(text):
    dead, alive = (data.cache_folder() / f".tmp-{name}" for name in ("dead", "alive"))
    for left in (dead, alive):
        left.mkdir(parents=True)
        (left / "train.bin").write_bytes(b"half")
        os.utime(left, (0, 0))
    os.utime(dead / "train.bin", (0, 0))
    data.tokenize(corpus.find((text,)), 300)
    assert not dead.exists() and alive.exists()


def test_nothing_is_left_behind_by_a_failure(text, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.tokenize(corpus.find((text,)), 300)
    assert not list(data.cache_folder().iterdir())

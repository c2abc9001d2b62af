"""The corpus, its split, and the cache: what is read, what is refused, and that nothing half-written is trusted."""

import gzip
import json
import os
import random
import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import write_text

from fastlm.objectives import Causal
from fastlm.trainer.data import corpus, files, tokenizer
from fastlm.trainer.data import tokens as data
from fastlm.trainer.words import Refusal

# ---------------------------------------------------------------------------------------------------------------------
# Which files


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of 200 small files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(200):
        write_text(folder / f"{i:03}.txt", seed=i, lines=20)
    return folder


def sides(found: corpus.Corpus) -> dict[str, bool]:
    return {source.name: source.chosen > 0 for source in found.sources}


def test_default_is_the_standard_library():
    found = corpus.find(())
    names = {source.name for source in found.sources}
    assert "standard library" in found.name and {"os.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("test/", "idlelib/", "site-packages/")) for name in names)
    assert found.whole and found.repeated < 0.3


def test_torch_stands_in_for_a_missing_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = corpus.find(())
    assert found.name.startswith("torch's own sources") and "optim/adamw.py" in {
        source.name for source in found.sources
    }
    monkeypatch.setattr(corpus, "TORCH_PARTS", ())
    with pytest.raises(Refusal, match="--data PATH"):
        corpus.find(())


def test_split_stays_when_files_come_go_or_move(many):
    before = corpus.find((many,))
    assert before.whole and 2 <= sum(sides(before).values()) <= 25
    write_text(many / "new.txt", seed=1000)
    (many / "000.txt").unlink()
    (many / "001.txt").rename(many / "moved.txt")
    after = sides(corpus.find((many,)))
    kept = sides(before)
    assert all(after[name] == kept[name] for name in kept if name in after)
    assert after["moved.txt"] == kept["001.txt"]


def test_copies_land_on_one_side(many):
    for path in list(many.iterdir()):
        shutil.copy(path, many / f"copy-{path.name}")
    split = sides(corpus.find((many,)))
    assert all(split[name] == split[f"copy-{name}"] for name in split if not name.startswith("copy"))


def test_nothing_is_on_both_sides(many):
    found = corpus.find((many,))
    train, held_out = (set(found.documents(side)) for side in (False, True))
    assert train and held_out and not train & held_out


def test_one_file_is_held_out_by_its_end(text):
    found = corpus.find((text,))
    (train,), (held_out,) = (list(found.documents(side)) for side in (False, True))
    assert not found.whole and train + held_out == text.read_text() and train.endswith("\n")
    assert 0.04 < len(held_out) / len(train) < 0.07


def test_lines_of_jsonl_are_held_out_whole(tmp_path):
    rows = [f"document {i} of a file, with some words in it" for i in range(500)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = corpus.find((tmp_path,))
    train, held_out = (list(found.documents(side)) for side in (False, True))
    assert found.whole and sorted(train + held_out) == sorted(rows) and 10 < len(held_out) < 50


def test_fingerprint_sees_every_byte_and_name(many):
    prints = {corpus.find((many,)).fingerprint}
    path = many / "100.txt"
    path.write_text(path.read_text()[:-2] + "!\n")
    prints.add(corpus.find((many,)).fingerprint)
    path.rename(many / "other.txt")
    prints.add(corpus.find((many,)).fingerprint)
    assert len(prints) == 3


def documents(path, text_key="text") -> list[str]:
    return files.read_documents(path, text_key, files.Skipped().add)


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "B.MD").write_text("# head")
    (tmp_path / "c.py").write_text("x = 1")
    (tmp_path / "d.jsonl").write_text('{"text": "one\\u2028line"}\n\n"two"\n')
    with gzip.open(tmp_path / "e.TXT.gz", "wt") as file:
        file.write("packed")
    (tmp_path / "f.csv").write_text('id,text\n1,"two\nlines, quoted"\n2,plain\n')
    (tmp_path / "g.tsv").write_text("text\tid\ntabs\t1\n")
    (tmp_path / "h.txt").write_text("two bytes a letter", encoding="utf-16")
    (tmp_path / "i.txt").write_text("marked", encoding="utf-8-sig")
    found = corpus.find((tmp_path,))
    assert [d for source in found.sources for d in documents(source.path)] == [
        "# head", "plain", "x = 1", "one\u2028line", "two", "packed", "two\nlines, quoted", "plain", "tabs",
        "two bytes a letter", "marked",
    ]  # fmt: skip
    assert not found.skipped.counts


@pytest.mark.parametrize("content, held, told", [
    ('[{"text": "one"}, "two", {"body": "x"}, 7]', ["one", "two"], ["rows.json:3 (has body)", "rows.json:4"]),
    ('[\n  {"text": "one",\n   "id": 1}\n]\n', ["one"], []),
    ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"], []),  # lines, whatever the name says
    ('{"text": "one"}\n', ["one"], []),
    ('{"text": "one"}\n{"text": "tw', ["one"], ["no JSON in a line: rows.json:2"]),
])  # fmt: skip
def test_a_json_array_is_rows(tmp_path, content, held, told):
    (tmp_path / "rows.json").write_text(content)
    for path in (tmp_path, tmp_path / "rows.json"):
        found = corpus.find((path,))
        assert documents(found.sources[0].path) == held
        lines = "\n".join(found.skipped.lines())
        assert all(words in lines for words in told) and bool(lines) == bool(told)


@pytest.mark.parametrize("content", ('{"a": 1,\n "b": 2}', "[]", "[[1, 2]]", "null"))
def test_json_without_text_is_refused(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(Refusal, match=r"no text in it: rows\.json"):
        corpus.find((tmp_path / "rows.json",))


def test_what_is_not_taken_is_told_with_its_place(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "zeros.txt").write_bytes(bytes(100))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:20])
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / ".git").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path)
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
    found = corpus.find((tmp_path,))
    assert [s.name for s in found.sources] == ["good.txt"]
    told = "\n".join(found.skipped.lines())
    for words in (
        "2 × no text in it: blank.txt, empty.txt", "1 × not UTF-8; `iconv -t UTF-8` converts it: latin.txt",
        "1 × binary: zeros.txt", ": cut.txt.gz", "1 × a hidden folder: .git",
        "1 × unreadable (Permission denied): locked",
        "1 × a link to a folder; give that folder itself to --data: circle",
        "a file named itself is read as plain text: page.html",
    ):  # fmt: skip
        assert words in told
    assert ("1 × not a regular file: pipe.txt" in told) == hasattr(os, "mkfifo")


def test_a_bad_row_costs_its_row_alone(tmp_path):
    rows = [
        '{"text": "one"}',
        '{"text": null}',
        '"two"',
        "{bad",
        '{"text": " "}',
        '{"content": "x", "id": 1}',
        "7",
        '{"text": "three"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "rows.csv").write_text("id,text\n1,four\n2\n3,five\n")
    found = corpus.find((tmp_path,))
    assert [d for source in found.sources for d in documents(source.path)] == ["four", "five", "one", "two", "three"]
    assert found.skipped.lines() == [
        "4 × no text in a row: rows.csv:3, rows.jsonl:2, rows.jsonl:5, …",
        "1 × no JSON in a line: rows.jsonl:4",
        '1 × no field "text" in a row; --text-key names another: rows.jsonl:6 (has content, id)',
    ]


@pytest.mark.parametrize("name, content", (("a.jsonl", '{"body": "words", "id": 3}'), ("a.csv", "id,body\n3,words")))
def test_the_field_of_the_text_can_be_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert documents(tmp_path / name, "body") == ["words"]
    found = corpus.find((tmp_path,), "body")
    assert [*found.documents(False), *found.documents(True)]
    with pytest.raises(Refusal, match=r'no field "text" in a row; --text-key names another: a\..*body'):
        corpus.find((tmp_path,))


@pytest.mark.parametrize("make, words", [
    (lambda p: p.with_name("date.txt").touch(), r"--data .*data\.txt does not exist; did you mean .*date\.txt\?"),
    (lambda p: p.write_text(""), "1 × no text in it: data.txt"),
    (lambda p: p.mkdir(), "no file is there"),
])  # fmt: skip
def test_no_text_is_refused(tmp_path, make, words):
    make(tmp_path / "data.txt")
    with pytest.raises(Refusal, match=words) as refused:
        corpus.find((tmp_path / "data.txt",))
    assert "\n" not in str(refused.value)


def test_repeated_lines_are_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("the same long line, again and again\n" * 100)
    assert corpus.find((tmp_path,)).repeated == pytest.approx(0.99)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_tokens(text):
    found = corpus.find((text,))
    tokens = data.tokenize(found, vocab=300)
    encoder = tokenizer.load_tokenizer(tokens.tokenizer_file)
    assert tokens.facts.vocab_size == 300 and tokens.train.dtype == np.uint16
    for side, ids in ((False, tokens.train), (True, tokens.held_out)):
        assert ids[-1] == tokenizer.EOS and encoder.decode(ids[:-1].tolist()) == "".join(found.documents(side))
    assert tokens.bytes_of()[tokens.held_out].sum() == tokens.facts.held_out_bytes
    assert 0 < tokens.bits_per_byte(tokens.facts.unigram_nats) < 8


def test_tokenizer_learns_from_train_alone(many):
    write_text(many / "held.txt", seed=5)
    found = corpus.find((many,))
    held = next(source for source in found.sources if source.chosen)
    before = data.tokenize(found, 300).tokenizer_file.read_text()
    other = next(text for text in ("ξψω " * n for n in range(1, 1000)) if corpus.chosen(text))
    held.path.write_text(other)
    assert data.tokenize(corpus.find((many,)), 300).tokenizer_file.read_text() == before


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


def test_a_text_that_changes_meanwhile_is_refused(many):
    found = corpus.find((many,))
    write_text(many / "150.txt", seed=77, lines=20)
    with pytest.raises(Refusal, match=r"150\.txt changed while the text was being read"):
        data.tokenize(found, 300)
    assert not list(data.cache_folder().iterdir())


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


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_batches_are_a_function_of_their_number():
    ids = np.arange(1000)
    one, other = Causal(ids, 16), Causal(ids, 16)
    for first in (0, 4, 400):  # the last is far into a later epoch
        later = other.batch(7, first + 2, 2)
        assert (one.batch(7, first, 4)["inputs"][2:] == later["inputs"]).all()


def test_an_epoch_sees_each_window_once_and_the_next_ones_elsewhere():
    ids = np.arange(1000)
    task = Causal(ids, 16)
    starts = [task.batch(7, epoch * len(task), len(task))["inputs"][:, 0].sort().values for epoch in range(3)]
    assert all((s.diff() == 16).all() for s in starts)
    assert len({s[0].item() for s in starts}) > 1


def test_labels_are_one_ahead_and_the_last_token_is_reached():
    task = Causal(np.arange(16 * 5 + 1), 16)
    batch = task.fixed(np.arange(task.windows))
    assert (batch["labels"] == batch["inputs"] + 1).all() and batch["labels"].max() == 16 * 5
    assert task.targets(batch) == {"loss": 16 * 5}


def test_random_windows_stay_inside():
    draw = random.Random(0)
    for _ in range(200):
        context = draw.randint(1, 20)
        n = context + draw.randint(1, 100)
        task = Causal(np.arange(n), context)
        batch = task.batch(draw.randint(0, 9), draw.randint(0, 99), 5)
        assert batch["labels"].max() < n and batch["inputs"].min() >= 0


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="smaller --context"):
        Causal(np.arange(16), 16)

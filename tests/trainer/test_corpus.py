"""The corpus and its split: which files and rows are read, what is told of the others, what is held out."""

import gzip
import json
import os
import shutil

import pytest
from runs import write_text

from fastlm.trainer.data import corpus, files
from fastlm.trainer.data import tokens as data
from fastlm.trainer.words import Refusal


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


def test_a_quote_that_is_not_closed_takes_no_other_row(tmp_path):
    (tmp_path / "rows.csv").write_text('id,text\n1,5" wide\n2,"a ""word"""\n3,"b" c\n4,four\n5,"five\n6,six\n')
    found = corpus.find((tmp_path,))
    assert [d for source in found.sources for d in documents(source.path)] == ['5" wide', 'a "word"', "four"]
    assert found.skipped.lines() == [
        "1 × no row of a table (',' expected after '\"'): rows.csv:4",
        "1 × no row of a table (unexpected end of data): rows.csv:6",
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


def test_tokenizer_learns_from_train_alone(many):
    write_text(many / "held.txt", seed=5)
    found = corpus.find((many,))
    held = next(source for source in found.sources if source.chosen)
    before = data.tokenize(found, 300).tokenizer_file.read_text()
    other = next(text for text in ("ξψω " * n for n in range(1, 1000)) if corpus.chosen(text))
    held.path.write_text(other)
    assert data.tokenize(corpus.find((many,)), 300).tokenizer_file.read_text() == before


def test_a_text_that_changes_meanwhile_is_refused(many):
    found = corpus.find((many,))
    write_text(many / "150.txt", seed=77, lines=20)
    with pytest.raises(Refusal, match=r"150\.txt changed while the text was being read"):
        data.tokenize(found, 300)
    assert not list(data.cache_folder().iterdir())

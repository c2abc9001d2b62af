"""Cleaning: each rule alone, what repeats and what only seems to, and the same output whatever stopped the work."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from dying import killed
from runs import fail

from fastlm.trainer import cli
from fastlm.trainer.data.cleaning import passes, rules, sketches
from fastlm.trainer.data.cleaning.rules import Rules
from fastlm.trainer.data.shards import reading

GOOD = "This is a line of words. Here is another one of them.\nAnd a third one ends it all."


@pytest.mark.parametrize("rule, line", (
    ("punctuation", "this line ends with no mark at all"),
    ("punctuation", "this line is cut in the middle..."),
    ("words", "Too few words."),
    ("javascript", "Please turn on JavaScript in your browser."),
    ("policy", "By reading on you accept our Privacy Policy."),
))  # fmt: skip
def test_a_line_falls_under_one_rule_and_under_none_without_it(rule, line):
    dropped = Counter()
    assert Rules().applied(f"{line}\n{GOOD}", dropped) == (GOOD, None) and dropped == {rule: 1}
    assert Rules({rule}).applied(f"{line}\n{GOOD}", dropped) == (f"{line}\n{GOOD}", None) and dropped == {rule: 1}


@pytest.mark.parametrize("rule, document", (
    ("lorem", f"{GOOD}\nLorem Ipsum stands where a text will be."),
    ("braces", f"{GOOD}\nif (x) {{ y is code and no text."),
    ("vulgar", f"{GOOD}\nWhat a Darn word that one is."),
    ("sentences", "Only one sentence stands here."),
))  # fmt: skip
def test_a_document_falls_under_one_rule_and_under_none_without_it(rule, document):
    assert Rules((), frozenset({"darn"})).applied(document, Counter())[1] == rule
    assert Rules({rule}, frozenset({"darn"})).applied(document, Counter()) == (document, None)


def test_marks_of_citations_are_taken_out():
    text, reason = Rules().applied(GOOD.replace("words.", "words[12][citation needed]."), dropped := Counter())
    assert (text, reason) == (GOOD, None) and dropped == {"citations": 2}


def test_a_word_around_a_mark_of_a_citation_is_found():
    for line, rule in (("Please turn on Java[1]Script in it.", "javascript"), ("Our terms[2] of use hold.", "policy")):
        assert Rules().applied(f"{line}\n{GOOD}", dropped := Counter()) == (GOOD, None)
        assert dropped == {"citations": 1, rule: 1}


def test_sentences_are_the_text():
    text = 'One. "Two!" Three? four 3.5 five\n\nSix.'
    assert rules.sentences(text) == ["One. ", '"Two!" ', "Three? ", "four 3.5 five\n\n", "Six."]


def test_sentences_are_cut_alike_one_by_one_and_many_at_once():
    """Each sentence's hash, found in a block of texts, is that of the same sentence alone."""
    draw = random.Random(0)
    texts = ["".join(draw.choice("ab.!?\n\n \x1c\t\"')]") for _ in range(draw.randrange(30))) for _ in range(3000)]
    for found, wanted in zip(sketches._ascii_sentences(texts), sketches._sentences(texts), strict=True):
        assert found.tolist() == wanted.tolist()
    mixed = [text + "é" * (i % 3 == 0) for i, text in enumerate(texts)]
    spans, counts = sketches.span_keys(mixed)
    one = [sketches.span_keys([text]) for text in mixed]
    assert spans.tolist() == [key for found, _ in one for key in found] and counts.tolist() == [n[0] for _, n in one]


def alike(shared: int, words: int, draw: random.Random) -> tuple[str, str]:
    """Two texts of so many words, of which so many at the beginning are the same."""
    new = lambda n: [f"w{draw.randrange(10**9)}" for _ in range(n)]
    head = new(shared)
    return " ".join(head + new(words - shared)), " ".join(head + new(words - shared))


def similarity(*texts: str) -> float:
    """Jaccard's, of shingles."""
    one, two = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in map(str.split, texts))
    return len(one & two) / len(one | two)


@pytest.mark.parametrize("shared, words", ((190, 200), (180, 200), (55, 60), (150, 200), (20, 200)))
def test_bands_agree_as_often_as_they_should(shared, words):
    """1 - (1 - s^8)^14 of 400 pairs, within five standard deviations of a binomial, and of one permutation's bins."""
    draw = random.Random(0)
    pairs = [alike(shared, words, draw) for _ in range(400)]
    one, two = (sketches.band_keys(texts) for texts in zip(*pairs, strict=True))
    share = (one == two).any(1).mean()
    s = similarity(*pairs[0])
    wanted = 1 - (1 - s**sketches.ROWS) ** sketches.BANDS
    assert abs(share - wanted) < 5 * max(wanted * (1 - wanted) / 400, 1e-4) ** 0.5 + 0.03


def test_keys_are_each_texts_own():
    """Whatever stands beside it, and however short it is."""
    texts = ["", "one", "One  ", "a b c d e", "a b c d e f. G h? I j!\nK", "日本語 é " * 9, "a b c d e"]
    for made in (sketches.keys, sketches.band_keys):
        together = made(texts)
        assert all((made([text])[0] == row).all() for text, row in zip(texts, together, strict=True))
        assert (together[1] == together[2]).all() and not (together[0] == together[1]).any()
    spans, counts = sketches.span_keys(texts)
    assert np.split(spans, counts.cumsum())[4].tolist() == sketches.span_keys([texts[4]])[0].tolist()
    assert counts.tolist() == [0, 0, 0, 0, 2, 0, 0]


@pytest.mark.parametrize("limit", (1, 7, 1000))
def test_repeats_in_any_number_of_rounds(monkeypatch, limit):
    monkeypatch.setattr(passes, "LIMIT", limit)
    arrays = [np.array(some, np.uint64) for some in ([5, 3, 5], [], [3, 9, 9, 2**63], [2**63])]
    found = passes.repeats(lambda: iter(arrays))
    assert [x.tolist() for x in found] == [[False, False, True], [], [True, False, True, False], [True]]


def sentence(draw) -> str:
    return " ".join(f"word{draw.randrange(10**6)}" for _ in range(8)).capitalize() + "."


@pytest.fixture
def web(tmp_path):
    draw = random.Random(0)
    pages = [" ".join(sentence(draw) for _ in range(20)) for _ in range(60)]
    pages[20] = pages[3].upper()  # exact
    pages[30] = pages[4].replace("word", "Word", 1) + " One more sentence of other words."  # near
    middle = " ".join(rules.sentences(pages[5])[8:11])
    pages[40] = f"{pages[40]} {' '.join(middle.split())}"  # spans
    pages[41] = "Menu | Home"
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    return tmp_path / "web.jsonl", pages


def clean(path, out, *more) -> int:
    return cli.main(["data", "clean", str(path), "--out", str(out), "--part", "0.02", "--processes", "1", *more])


def kept(out) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("web/*.jsonl")) for line in path.read_text().splitlines()]


def tree(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_repeats_goes_and_the_first_stays(web, capsys, monkeypatch):
    path, pages = web
    read: list = []  # what is before a part is read for what the report shows, and not for each document
    real = reading._lines_before
    monkeypatch.setattr(reading, "_lines_before", lambda *where: read.append(where) or real(*where))
    out = path.with_name("out")
    assert clean(path, out) == 0
    wanted = [page for i, page in enumerate(pages) if i not in (20, 30, 40, 41)]
    texts = [row["text"] for row in kept(out)]
    assert [text for text in texts if text in pages] == wanted and len(texts) == len(wanted) + 1
    assert texts[38] == " ".join("".join(rules.sentences(pages[40])[:20]).split())
    (source,) = json.loads((out / "report.json").read_text())["sources"].values()
    counts = {reason: found["count"] for reason, found in source["dropped"].items()}
    assert counts == {"punctuation": 1, "sentences": 1, "exact": 1, "near": 1, "spans": 3}
    assert source["documents"] == 60 and source["kept documents"] == 57
    assert source["dropped"]["exact"]["examples"][0].startswith("web.jsonl:21 ")
    assert 0 < len(read) <= 7
    said = capsys.readouterr().out
    assert "57 of 60 documents" in said and "web.jsonl:31" in said
    assert clean(path, out.with_name("all"), "--without", *passes.REPEATS, *rules.RULES) == 0
    assert [row["text"] for row in kept(out.with_name("all"))] == pages


def test_killed_in_each_pass_and_gone_on(web):
    path, _ = web
    clean(path, path.with_name("whole"))
    out = path.with_name("killed")
    asked = ["data", "clean", str(path), "--out", str(out), "--part", "0.02", "--processes", "1"]
    for at in (6, 23, 11, 7):
        killed("fastlm.trainer.disk.flush", at, *asked)
    assert clean(path, out) == 0 and tree(out) == tree(path.with_name("whole"))


def test_judges_of_ones_own(web, tmp_path, capsys):
    path, pages = web
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def detect(text): return 'de' if 'word1' in text.split()[2] else 'en'\n"
        "def score(text): return float(len(text) % 2)\n"
    )
    more = ["--language", f"{mine}:detect", "--quality", f"{mine}:score", "--without", *passes.REPEATS]
    assert clean(path, path.with_name("out"), *more) == 0
    assert kept(path.with_name("out")) == [
        {"text": page, "quality": 1.0}
        for page in pages
        if len(page) % 2 and page != "Menu | Home" and "word1" not in page.split()[2]
    ]
    there = "data", "clean", str(path), "--out", str(path.with_name("other"))
    for words, said in (
        (["--quality", f"{mine}:none"], "has no function none"),
        (["--quality", "score"], "is no MODULE:FUNCTION"),
        (["--language", "nowhere:detect"], "--language nowhere cannot be imported"),
        (["--without", "brace"], "did you mean braces?"),
    ):
        assert said in fail(capsys, *there, *words)

"""Tasks: which rows make examples, how they are laid out, what is counted of them, and what nothing learned reaches."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from runs import TINY, write_text

from fastlm.models.heads import Factors
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.tokenizer import bare_vocabulary, load_tokenizer, vocabulary
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.tasks import TASKS, library, rows
from fastlm.trainer.tasks.examples import HELD_OUT, fingerprint, sides_of
from fastlm.trainer.tasks.layout import Layout
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.tasks.spans import f1, normal
from fastlm.trainer.tasks.task import Head
from fastlm.trainer.words import Refusal

KNOWN = bare_vocabulary(300)
SHAPES = {
    name: preset(name, vocab_size=300, context=16, dim=32, layers=2, heads=2, head="none", pair_labels=0, **more)
    for name, more in {"bert": {}, "xlnet": {}, "llama": {}, "bart": {}}.items()
}
POOLING = {"bert": "bert", "xlnet": "xlnet", "llama": "gpt2", "bart": "bart"}


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_text(tmp_path / "text.txt", seed=0)
    return load_tokenizer(tokenize(find((tmp_path / "text.txt",)), TINY["vocab"]).tokenizer_file)


def encoding(tokenizer):
    def encode(text):
        made = tokenizer.encode(text)
        return made.ids, made.offsets

    return encode


def jsonl(path, made) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def read(path, kind=None, skipped=None):
    return rows.read(path, "--task", kind, (skipped or Skipped()).add)


def task(name, kind, examples, labels=()):
    return TASKS[name](examples, 16, KNOWN, SHAPES[kind], Head(POOLING[kind], labels))


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("columns, kind, first", [
    ({"text": "a", "label": "x"}, "classification", Row("a", None, "x")),
    ({"text": "a", "label": 1}, "classification", Row("a", None, "1")),
    ({"text": "a", "label": True}, "classification", Row("a", None, "true")),
    ({"text": "a", "text_pair": "b", "label": "x"}, "classification", Row("a", "b", "x")),
    ({"text": "a", "text2": "b", "label": 0.5}, "regression", Row("a", "b", "0.5")),
    ({"text": "a", "label": 2.0}, "regression", Row("a", None, "2.0")),
    ({"question": "q", "context": "the cat", "answer": "cat", "start": 4}, "spans", Row("q", "the cat", "cat", 4)),
    ({"text": "q", "context": "the cat", "answer": "cat", "answer_start": 4}, "spans", Row("q", "the cat", "cat", 4)),
    ({"source": "s", "target": "t"}, "text-to-text", Row("s", None, "t")),
    ({"input": "s", "output": 5}, "text-to-text", Row("s", None, "5")),
])  # fmt: skip
def test_columns_say_the_kind(tmp_path, columns, kind, first):
    jsonl(tmp_path / "rows.jsonl", [columns])
    assert read(tmp_path / "rows.jsonl") == (kind, [first])


def test_a_table_is_read_alike(tmp_path):
    (tmp_path / "rows.csv").write_text('text,label\n"one, two",1.5\nthree,2\n')
    assert read(tmp_path / "rows.csv") == ("regression", [Row("one, two", None, "1.5"), Row("three", None, "2")])
    (tmp_path / "rows.csv").write_text("text,label\none,1\nthree,2\n")
    assert read(tmp_path / "rows.csv")[0] == "classification"
    assert read(tmp_path / "rows.csv", "regression")[0] == "regression"


def test_what_is_no_example_is_told_with_its_place(tmp_path):
    good = {"text": "a", "label": "x"}
    text = "\n".join([json.dumps(good), "{", json.dumps({"text": "b"}), json.dumps({"text": " ", "label": "x"}), "5"])
    (tmp_path / "rows.jsonl").write_text(text)
    skipped = Skipped()
    assert read(tmp_path / "rows.jsonl", skipped=skipped)[1] == [Row("a", None, "x")]
    assert skipped.lines() == [
        "1 × no JSON in a line: rows.jsonl:2",
        "1 × no object in a row: rows.jsonl:5",
        '1 × no "label" in a row: rows.jsonl:3',
        '1 × no "text" or "question" in a row: rows.jsonl:4',
    ]


@pytest.mark.parametrize("made, kind, words", [
    ([], None, "holds no rows"),
    ([{"txt": "a", "label": "x"}], None, "has the columns txt, label; give those of one kind: "),
    ([{"text": "a", "label": "x"}], "spans", 'has text, label, and --kind spans needs "context" and "answer" and '),
    ([{"text": "a", "label": "x"}], "regression", "holds no row of --kind regression: the first has text 'a', label"),
    ([{"text": "q", "context": "c", "answer": "b", "start": 0}], None, "holds no row of --kind spans"),
])  # fmt: skip
def test_files_without_examples_are_refused(tmp_path, made, kind, words):
    jsonl(tmp_path / "rows.jsonl", made)
    with pytest.raises(Refusal) as refusal:
        read(tmp_path / "rows.jsonl", kind)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.txt").write_text("a\tb\n")
    with pytest.raises(Refusal, match=r"is no \.jsonl, \.json, \.csv or \.tsv"):
        read(tmp_path / "rows.txt")
    (tmp_path / "rows.csv").write_bytes(b"text,label\n\xff\xfe\n")
    with pytest.raises(Refusal, match=r"rows\.csv: not UTF-8"):
        read(tmp_path / "rows.csv")


def test_labels_stand_in_order():
    labels = lambda *names: rows.labels_of([Row("", None, name) for name in names])
    assert labels("10", "9", "-1", "9") == ("-1", "9", "10") and labels("b", "10", "a") == ("10", "a", "b")


def test_sides_are_drawn_by_the_seed_and_keep_what_belongs_together():
    made = [Row(f"text {i % 50}", None, str(i)) for i in range(100)]
    train, held_out = sides_of(made, 0)
    assert len(held_out) == 2 * HELD_OUT * 50 and not {r.first for r in train} & {r.first for r in held_out}
    assert sides_of(made, 0) == (train, held_out) != sides_of(made, 1)
    assert fingerprint(train, held_out) != fingerprint(held_out, train)
    grouped = [row._replace(group=str(i // 10)) for i, row in enumerate(made)]
    assert len({row.group for row in sides_of(grouped, 0)[1]}) == 1


def test_the_library_has_rows_of_three_labels_without_their_marks():
    name, made = library.rows()
    counts = {label: sum(row.answer == label for row in made) for label in ("code", "comment", "docstring")}
    assert "standard library" in name and len(made) > 1000 and len(set(counts.values())) == 1
    assert not any("#" in row.first or row.first.startswith('"""') for row in made)
    assert library.rows()[1] == made


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def test_rows_are_laid_out_as_the_family_reads_them():
    layouts = {kind: Layout.of(shape, POOLING[kind], KNOWN) for kind, shape in SHAPES.items()}
    assert layouts["bert"].row([7, 8], None).ids == [3, 7, 8, 1]
    assert layouts["bert"].row([7, 8], [9]).ids == [3, 7, 8, 1, 9, 1]
    assert layouts["xlnet"].row([7, 8], [9]).ids == [7, 8, 1, 9, 1, 3]
    assert layouts["llama"].row([7, 8], [9]).ids == layouts["bart"].row([7, 8], [9]).ids == [7, 8, 1, 9, 1]
    left = layouts["xlnet"].batch([layouts["xlnet"].row([7], None), layouts["xlnet"].row([7, 8, 9], None)])
    assert left["inputs"].tolist() == [[0, 0, 7, 1, 3], [7, 8, 9, 1, 3]]
    assert left["real"].tolist() == [[False, False, True, True, True], [True] * 5]
    pair = layouts["bert"].batch([layouts["bert"].row([7, 8], [9]), layouts["bert"].row([7], None)])
    assert pair["types"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6] and "types" not in layouts["llama"].batch(
        [layouts["llama"].row([7], None)]
    )


@pytest.mark.parametrize("a, b, kept", [(4, 4, (4, 4)), (20, 4, (9, 4)), (4, 20, (4, 9)), (20, 20, (7, 6))])
def test_what_is_too_long_loses_the_end_of_the_longer(a, b, kept):
    layout = Layout.of(SHAPES["bert"], "bert", KNOWN)
    row = layout.row(list(range(10, 10 + a)), list(range(50, 50 + b)))
    assert len(row.ids) <= 16 and row.cut == a + b - sum(kept)
    assert row.ids == [3, *range(10, 10 + kept[0]), 1, *range(50, 50 + kept[1]), 1] and row.second == kept[0] + 2


# ---------------------------------------------------------------------------------------------------------------------
# What is learned and counted


class Says(torch.nn.Module):
    """In a model's place: the logits it was made with."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = logits if len(logits) > 1 else logits[0]

    def forward(self, *inputs, **options):
        return self.logits

    def states(self, *inputs, **options):
        return self.logits

    @property
    def head(self):
        return SimpleNamespace(factors=lambda x: Factors(x, torch.eye(x.shape[-1]), None))


def examples(
    name, kind, made, labels=(), encode=lambda text: (list(map(ord, text)), [(i, i + 1) for i in range(len(text))])
):
    layout, head = Layout.of(SHAPES[kind], POOLING[kind], KNOWN), Head(POOLING[kind], labels)
    return [TASKS[name].encode(row, layout, head, encode) for row in made]


def test_classification_counts_what_is_right_and_f1_of_the_second_label():
    made = examples("classification", "bert", [Row("x", None, label) for label in "nnyyy"], ("n", "y"))
    objective = task("classification", "bert", made, ("n", "y"))
    batch = objective.fixed(torch.arange(5).numpy())
    logits = torch.tensor([[2.0, 0], [0, 1], [0, 3], [0, 2], [1, 0]])  # right, false, right, right, missed
    terms, shares = objective.evaluate(Says(logits), batch)
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert terms["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item() * 5)
    measured = {name: objective.measure(name, torch.stack(x).double()) for name, x in shares.items()}
    assert measured == {"accuracy": 0.6, "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}
    base = objective.baseline(made, made, objective.head)
    assert (base.share, base.value, base.constant) == ("accuracy", 0.6, "always 'y'")
    assert base.loss == pytest.approx(-(2 * math.log(3 / 7) + 3 * math.log(4 / 7)) / 5)
    assert objective.entries()["id2label"] == {0: "n", 1: "y"}
    three = task(
        "classification", "bert", examples("classification", "bert", [Row("x", None, "b")], tuple("abc")), "abc"
    )
    assert three.shares == ("accuracy",)
    with pytest.raises(ValueError, match="a label that no row of the train side has"):
        examples("classification", "bert", [Row("x", None, "z")], ("n", "y"))


def test_regression_measures_squared_error_and_pearson():
    true, said = [1.0, 2.0, 4.0, 0.5], [1.5, 2.0, 3.0, 1.0]
    made = examples("regression", "llama", [Row("x", None, str(y)) for y in true])
    objective = task("regression", "llama", made)
    total, sums = 0.0, 0.0
    for part in ([0, 1], [2, 3]):  # over batches of a side
        batch = objective.fixed(torch.tensor(part).numpy())
        terms, shares = objective.evaluate(Says(torch.tensor([[said[i]] for i in part])), batch)
        total, sums = total + terms["loss"].item(), sums + torch.stack(shares["pearson"]).double()
    assert total == pytest.approx(0.25 + 0 + 1 + 0.25)
    expected = torch.corrcoef(torch.tensor([true, said], dtype=torch.float64))[0, 1].item()
    assert objective.measure("pearson", sums) == pytest.approx(expected, rel=1e-12)
    assert objective.worded("pearson", 0.5) == "0.500"
    mean = sum(true) / 4
    assert objective.baseline(made, made, Head("gpt2")).loss == pytest.approx(sum((y - mean) ** 2 for y in true) / 4)
    constant = torch.stack(
        objective.evaluate(Says(torch.ones(4, 1)), objective.fixed(torch.arange(4).numpy()))[1]["pearson"]
    )
    assert objective.measure("pearson", constant.double()) == 0.0


def test_spans_are_the_characters_of_their_ids():
    """Characters stand for ids: the answer "at" of "the cat" is places 5 and 6."""
    made = examples("spans", "bert", [Row("q", "the cat", "at", 5), Row("what?", "it is a very long text", "text", 18)])
    assert made[0].target == (5, 6) and made[1].target is None and made[1].row.cut
    objective = task("spans", "bert", made)
    batch = objective.fixed(torch.arange(2).numpy())
    begin = made[0].row.second
    assert batch["first"].tolist() == [begin + 5, IGNORED] and batch["last"].tolist() == [begin + 6, IGNORED]
    assert objective.targets(batch) == {"loss": 1}
    first, last = torch.zeros(2, *batch["inputs"].shape).unbind(0)
    first[0, begin + 4], last[0, begin + 6], last[0, begin + 1] = 9, 8, 10  # the likeliest end is before the beginning
    first[0, 0] = 99  # no place of the context
    terms, shares = objective.evaluate(Says(first, last), batch)
    assert objective.answers(Says(first, last), batch, made, None)[0] == "cat"
    assert [x.item() for x in shares["exact_match"]] == [0.0, 2.0] and terms["loss"].isfinite()
    first[0, begin + 5] = 12
    assert objective.answers(Says(first, last), batch, made, None)[0] == "at"
    shares = objective.evaluate(Says(first, last), batch)[1]
    assert [x.item() for x in shares["exact_match"]] == [1.0, 2.0]
    assert objective.baseline(made, made, Head("bert")).loss == pytest.approx(math.log(7))


def test_answers_are_compared_as_squad_does():
    assert normal("The  Cat's, a dog!") == "cats dog"
    assert f1("the black cat", "a cat") == pytest.approx(2 * 1 / 3) and f1("", "cat") == 0.0 and f1("the", "a") == 1.0


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_targets_are_written_after_their_sources(kind):
    made = examples("text-to-text", kind, [Row("ab", None, "xyz"), Row("abcd", None, "x")])
    objective = task("text-to-text", kind, made)
    batch = objective.fixed(torch.arange(2).numpy())
    x, y, z = map(ord, "xyz")
    if kind == "llama":
        assert batch["inputs"][0].tolist() == [97, 98, 1, x, y, z, 1]
        assert batch["labels"].tolist() == [[IGNORED] * 2 + [x, y, z, 1, IGNORED], [IGNORED] * 4 + [x, 1, IGNORED]]
    else:
        assert batch["inputs"].tolist() == [[97, 98, 1, 0, 0], [97, 98, 99, 100, 1]]
        assert batch["decoder_inputs"].tolist() == [[0, x, y, z], [0, x, 1, 0]]
        assert batch["labels"].tolist() == [[x, y, z, 1], [x, 1, IGNORED, IGNORED]]
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 300).float() * 50
    exact = lambda logits: [v.item() for v in objective.evaluate(Says(logits), batch)[1]["exact_match"]]
    assert exact(logits) == [2, 2]
    place = batch["labels"][0].tolist().index(1)
    logits[0, place] = 0  # the first goes on where it has to end
    assert exact(logits) == [1, 2]


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_what_is_counted_as_exact_is_what_is_written(kind, tokenizer):
    """A target that greedy decoding makes is counted, and one that differs in a token is not."""
    from dataclasses import replace

    from fastlm.models import Transformer

    torch.manual_seed(0)
    shape = replace(SHAPES[kind], head="lm", context=32)
    model, known = Transformer(shape).eval(), vocabulary(tokenizer)
    with torch.no_grad():  # so that it does not say the same of everything
        for p in model.parameters():
            p.mul_(3)
    head, layout = Head(POOLING[kind]), Layout.of(shape, POOLING[kind], known)
    source, encode = [9, 10, 11], lambda ids: (ids, None)
    objective = lambda *made: TASKS["text-to-text"](made, 32, known, shape, head)
    asked = TASKS["text-to-text"].encode(Row(source, None, [7]), layout, head, encode)
    inputs = torch.tensor([[*source, known.eos]])
    written = model.generate(inputs, 6, 0.0, eos=known.eos, pad=known.pad, start=known.pad)[0].tolist()
    written = written if kind == "bart" else written[4:]
    assert known.eos not in written  # so it is not the end that differs below
    for target, right in ((written, True), ([*written[:3], (written[3] + 1) % 300, *written[4:]], False)):
        labels = [*target, IGNORED]
        row = layout.row(source, target) if kind == "llama" else asked.row
        made = objective(asked._replace(row=row, target=labels))
        batch = made.fixed(torch.arange(1).numpy())
        logits = made._factors(model, batch).logits()
        assert bool(((logits.argmax(-1) == batch["labels"]) | (batch["labels"] == IGNORED)).all()) == right


@pytest.mark.parametrize("name", sorted(TASKS))
def test_batches_are_a_function_of_seed_and_number(name):
    made = {
        "classification": [Row(c, None, "ab"[i % 2]) for i, c in enumerate("qwertzuiop")],
        "regression": [Row(c, None, str(i)) for i, c in enumerate("qwertzuiop")],
        "spans": [Row("q", c + "abc", "a", 1) for c in "qwertzuiop"],
        "text-to-text": [Row(c, None, c) for c in "qwertzuiop"],
    }[name]
    kind = "llama" if name == "text-to-text" else "bert"
    objective, again = (task(name, kind, examples(name, kind, made, ("a", "b")), ("a", "b")) for _ in range(2))
    again.batch(1, 30, 5)
    first, other = objective.batch(0, 7, 6), again.batch(0, 7, 6)
    assert first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)
    epoch = objective.batch(0, 10, 10)["examples"].tolist()
    assert sorted(epoch) == list(range(10)) and epoch != objective.batch(0, 0, 10)["examples"].tolist()

"""`fastlm finetune`: what it says, refuses and leaves behind, and that a run goes on to the same bits."""

import json
import random
import shutil

import pytest
import torch
from dying import killed
from runs import fail, repeatable, train_in

from fastlm.trainer import cli
from fastlm.trainer.commands import run
from fastlm.trainer.data.tokenizer import load_tokenizer
from fastlm.trainer.outputs.metrics import read_rows
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Refusal

PRESETS = {"roberta": {}, "llama": {}, "bart": {}, "xlnet": {}}
FAST = ["--threads", "1", "--batch", "8", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A small run of each kind of model."""
    runs = {preset: dict(preset=preset, context=32, steps=20) for preset in PRESETS}
    return train_in(tmp_path_factory.mktemp("bases"), **runs)


def write(path, made) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return ["--task", str(path)]


def labelled(n=120, labels=("Ada", "Alan", "Grace"), seed=0) -> list[dict]:
    """Texts that begin with their label, or with another name."""
    draw = random.Random(seed)
    pick = lambda: draw.choice(labels)
    return [{"text": f"{(name := pick())} reads {draw.randint(1, 999)} lines", "label": name} for _ in range(n)]


def numbers(n=120) -> list[dict]:
    draw = random.Random(0)
    return [{"text": f"{word} writes {draw.randint(1, 999)} lines", "label": value + draw.random() / 10}
            for word, value in (draw.choice([("Ada", 0.0), ("Grace", 1.0)]) for _ in range(n))]  # fmt: skip


def answered(n=120) -> list[dict]:
    draw = random.Random(0)
    made = []
    for _ in range(n):
        name = draw.choice(["Ada", "Alan", "Grace"])
        context = f"{draw.randint(1, 99)} lines {name} writes"
        made.append({"question": "Who", "context": context, "answer": name, "start": context.index(name)})
    return made


def texts(n=120) -> list[dict]:
    draw = random.Random(0)
    pairs = {"Ada": "writes", "Alan": "reads", "Grace": "proves"}
    return [{"source": f"{(name := draw.choice([*pairs]))} {draw.randint(1, 999)}", "target": pairs[name]}
            for _ in range(n)]  # fmt: skip


def last(folder) -> dict:
    found = [row for row in read_rows(folder / "metrics.jsonl") if "held_out_loss" in row]
    return found[-1]


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_are_classified_and_open_in_transformers(bases, tmp_path, capsys, preset):
    """With the same answers there, from the same rows."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
    task, out = write(tmp_path / "names.jsonl", labelled(240)), tmp_path / "run"
    assert cli.main(["finetune", str(bases / preset), *task, "--out", str(out), "--epochs", "6", *FAST]) == 0
    assert last(out)["held_out_accuracy"] > 0.45  # 0.26 without a look at the row
    said = capsys.readouterr().out
    assert f"begins   with the weights of {bases / preset} · " in said and "to beat  label frequencies 1." in said
    opener = f'weights open with transformers.AutoModelForSequenceClassification.from_pretrained("{out}")'
    assert opener in said
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    asked = [f"{name} reads {n} lines" for name in ("Ada", "Alan", "Grace") for n in (7, 70)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in asked))
    assert cli.main(["predict", str(out), str(tmp_path / "asked.jsonl")]) == 0
    ours = [json.loads(line)["prediction"] for line in capsys.readouterr().out.splitlines()]
    for text, expected in zip(asked, ours, strict=True):
        ids = load_tokenizer(out / "tokenizer.json").encode(text).ids
        row = {"roberta": [3, *ids, 1], "xlnet": [*ids, 1, 3]}.get(preset, [*ids, 1])
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits
        assert model.config.id2label[logits.argmax().item()] == expected
    assert len(set(ours)) > 1


def test_two_labels_have_an_f1_and_pairs_are_one_row(bases, tmp_path, capsys):
    made = [{"text": row["text"], "text_pair": name, "label": "yes" if name == row["label"] else "no"}
            for row, name in zip(labelled(), (["Ada", "Grace"] * 60), strict=True)]  # fmt: skip
    out = tmp_path / "run"
    assert cli.main(["finetune", str(bases / "roberta"), *write(tmp_path / "pairs.jsonl", made), "--out", str(out),
                     *FAST]) == 0  # fmt: skip
    assert {"held_out_accuracy", "held_out_f1"} <= last(out).keys()
    assert " accuracy " in capsys.readouterr().out and "always 'no': accuracy" in (out / "report.md").read_text()
    assert " ‖ " in (out / "sample.txt").read_text() and "\n→ " in (out / "sample.txt").read_text()


@pytest.mark.parametrize("preset", ["roberta", "llama"])
def test_numbers_are_learned(bases, tmp_path, capsys, preset):
    task, out = write(tmp_path / "numbers.jsonl", numbers(240)), tmp_path / "run"
    assert cli.main(["finetune", str(bases / preset), *task, "--out", str(out), "--epochs", "6", *FAST]) == 0
    found, said = last(out), capsys.readouterr().out
    assert found["held_out_loss"] < 0.1 and found["held_out_pearson"] > 0.9
    assert "squared error · pearson 0." in said and "the mean 0.2" in said
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1


def test_spans_are_found(bases, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
    task, out = write(tmp_path / "spans.jsonl", answered(400)), tmp_path / "run"
    assert cli.main(["finetune", str(bases / "roberta"), *task, "--out", str(out), "--epochs", "8", *FAST]) == 0
    found = last(out)
    assert found["held_out_exact_match"] > 0.8 and found["held_out_f1"] >= found["held_out_exact_match"]
    transformers.AutoModelForQuestionAnswering.from_pretrained(out)
    write(tmp_path / "asked.jsonl", [{"question": "Who", "context": "7 lines Grace writes"}])
    capsys.readouterr()
    assert cli.main(["predict", str(out), str(tmp_path / "asked.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] == "Grace"


@pytest.mark.parametrize("preset", ["llama", "bart"])
def test_texts_answer_texts_and_can_be_written(bases, tmp_path, capsys, preset):
    task, out = write(tmp_path / "texts.jsonl", texts(400)), tmp_path / "run"
    assert cli.main(["finetune", str(bases / preset), *task, "--out", str(out), "--epochs", "8", *FAST]) == 0
    assert last(out)["held_out_exact_match"] > 0.9
    capsys.readouterr()
    write(tmp_path / "asked.jsonl", [{"source": "Alan 17"}])
    assert cli.main(["predict", str(out), str(tmp_path / "asked.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out) == {"source": "Alan 17", "prediction": "reads"}
    if preset == "bart":
        assert cli.main(["sample", str(out), "--prompt", "Alan 17", "--temperature", "0"]) == 0
        assert "reads" in capsys.readouterr().out


def test_a_head_is_no_hindrance_to_another_task(bases, tmp_path, capsys):
    """A classifier is taught other labels, and goes on as a language model."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    base = ["--steps", "4", *FAST]
    assert cli.main(["finetune", str(bases / "roberta"), *write(tmp_path / "a.jsonl", labelled()), "--out", str(one),
                     *base]) == 0  # fmt: skip
    other = write(tmp_path / "b.jsonl", labelled(labels=("Ada", "Alan")))
    assert cli.main(["finetune", str(one), *other, "--out", str(two), *base]) == 0
    shutil.rmtree(two / "state")  # what was written at the end is enough
    capsys.readouterr()
    assert (
        cli.main(["pretrain", "--from", str(two), "--data", str(bases / "text.txt"), "--out", str(three), *base]) == 0
    )
    (begins,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("begins"))
    assert "head" in begins and "encoder" not in begins and "embedding" not in begins
    assert "was taught to label, and writes no text" in fail(capsys, "sample", str(one))


def test_lower_layers_may_learn_more_slowly(bases, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Trainer, "update", lambda self, update=Trainer.update: (made.append(self), update(self))[1])
    task = write(tmp_path / "a.jsonl", labelled())
    assert cli.main(["finetune", str(bases / "roberta"), *task, "--out", str(tmp_path / "run"), "--steps", "2",
                     "--layer-decay", "0.5", "--warmup", "0", "--schedule", "constant", *FAST]) == 0  # fmt: skip
    rates = {group["lr"] for group in made[-1].optimizer.param_groups}
    assert rates == {3e-3, 1.5e-3, 0.75e-3}  # the head, one layer, embeddings


def test_a_budget_of_tokens_saves_padding_and_changes_no_more_than_rounding(bases, tmp_path, monkeypatch):
    """Rows of 9 to 31 ids, by updates of 16; in two processes each has its half of every micro-batch."""
    draw, made = random.Random(0), []
    rows = [row | {"text": row["text"] + " and more" * draw.choice((0, 1, 5))} for row in labelled()]
    task = write(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(Trainer, "update", lambda self, update=Trainer.update: (made.append(self), update(self))[1])
    argv = ["finetune", str(bases / "roberta"), *task, "--steps", "4", *FAST, "--accumulate", "2"]
    assert cli.main([*argv, "--out", str(tmp_path / "one")]) == 0
    one = made[-1]
    assert cli.main([*argv, "--out", str(tmp_path / "two"), "--max-tokens", "64"]) == 0
    two = made[-1]
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5
    plain, cut = (trainer._batches(trainer.train, 16, 16) for trainer in (one, two))
    ids = lambda batches: sum(batch["inputs"].numel() for batch in batches)
    there = sum(int(batch["real"].sum()) for batch in plain)
    assert all(batch["inputs"].numel() <= 64 for batch in cut) and len(cut) > 2
    assert ids(cut) < (ids(plain) + there) / 2 and there == sum(int(batch["real"].sum()) for batch in cut)
    parts = [two.train.batches_of(0, 16, 16, 64, rank, 2) for rank in range(2)]
    examples = sorted(i for part in parts for batch in part for i in batch["examples"].tolist())
    assert examples == sorted(i for batch in plain for i in batch["examples"].tolist())
    assert [len(batch["examples"]) for batch in parts[0]] == [len(batch["examples"]) for batch in parts[1]]


def test_what_is_asked_is_answered(bases, tmp_path, capsys):
    """Of rows without answers, in their order; those that are none are told."""
    task, out = write(tmp_path / "a.jsonl", labelled(240)), tmp_path / "run"
    assert cli.main(["finetune", str(bases / "llama"), *task, "--out", str(out), "--epochs", "6", *FAST]) == 0
    write(
        tmp_path / "b.jsonl", [{"text": f"{name} reads 5 lines"} for name in ("Alan", "Grace", "Ada")] + [{"text": " "}]
    )
    capsys.readouterr()
    assert cli.main(["predict", str(out), str(tmp_path / "b.jsonl")]) == 0
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [(row["text"].split()[0], row["prediction"]) for row in answers] == [
        (x, x) for x in ("Alan", "Grace", "Ada")
    ]
    assert 'fastlm: skipped 1 × no "text" or "question" in a row: b.jsonl:4' in said.err
    assert "was not fine-tuned" in fail(capsys, "predict", str(bases / "llama"), str(tmp_path / "b.jsonl"))
    assert "nowhere.csv does not exist; give a file of rows" in fail(capsys, "predict", str(out), "nowhere.csv")
    (tmp_path / "c.csv").write_text("words\na\n")
    assert 'has words, and --kind classification needs "text"' in fail(
        capsys, "predict", str(out), str(tmp_path / "c.csv")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize(
    "n, save_every, more",
    [(3, "1e9", ()), (9, "0", ("--max-tokens", "60", "--order", "by-length"))],
    ids=("before-any", "between"),
)
def test_killed_and_resumed_it_is_the_same_without_the_folder(bases, tmp_path, n, save_every, more):
    shutil.copytree(bases / "roberta", tmp_path / "base")
    argv = ["finetune", str(tmp_path / "base"), *write(tmp_path / "a.jsonl", labelled()), "--dropout", "0.1",
            "--steps", "14", "--save-every", save_every, *more, *FAST]  # fmt: skip
    assert cli.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    killed("fastlm.trainer.outputs.metrics.Metrics.add", n, *argv, "--out", str(tmp_path / "killed"))
    shutil.rmtree(tmp_path / "base")
    assert run.resume(tmp_path / "killed") == 0
    assert repeatable(tmp_path / "killed") == repeatable(tmp_path / "whole")


def test_rows_that_changed_are_refused(bases, tmp_path):
    task = write(tmp_path / "a.jsonl", labelled())
    argv = ["finetune", str(bases / "roberta"), *task, "--out", str(tmp_path / "run"), *FAST]
    killed("fastlm.trainer.outputs.metrics.Metrics.add", 3, *argv)
    write(tmp_path / "a.jsonl", labelled(seed=1))
    with pytest.raises(Refusal, match=r"--task a\.jsonl changed since the run began: its SHA-256 was"):
        run.resume(tmp_path / "run")


def test_it_runs_with_nothing_given(bases, tmp_path, capsys):
    """Lines of Python's library."""
    assert cli.main(["finetune", str(bases / "roberta"), "--out", str(tmp_path / "run"), "--steps", "2", *FAST]) == 0
    said = capsys.readouterr().out
    assert "classification of 3 labels" in said and "held out: a tenth of the files" in said
    assert "are longer than the model reads, and were cut" in said


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def one_label():
    return [row | {"label": "x"} for row in labelled()]


@pytest.mark.parametrize("made, argv, words", [
    ([], [], "holds no rows"),
    (one_label(), [], "a.jsonl has one label, 'x', to train on; give rows of two or more"),
    (labelled(1), [], "a.jsonl has 1 row, and one of them is held out; give more rows"),
    (labelled(), ["--kind", "spans"], 'has text, label, and --kind spans needs "context" and "answer" and "start"'),
    (texts(), [], "--kind text-to-text writes text, and {folder} holds an encoder, which writes none"),
    (labelled(), ["--kind", "spam"], "--kind spam is unknown; did you mean spans?"),
    (labelled(), ["--epochs", "0"], "--epochs is 0; it must be above 0"),
    (labelled(), ["--held-out", "nowhere.csv"], "--held-out nowhere.csv does not exist"),
    (labelled(), ["--layer-decay", "2"], "--layer-decay is 2.0; it must be at most 1"),
    (labelled(), ["--max-tokens", "0"], "--max-tokens is 0; it must be at least 1"),
    (labelled(), ["--max-tokens", "5"], "--max-tokens 5 is less than the "),
    (labelled(), ["--dim", "64"], "finetune has no flag --dim"),
], ids=lambda x: None if isinstance(x, list) else x[:30])  # fmt: skip
def test_what_cannot_be_learned_is_said_in_one_line(bases, tmp_path, capsys, made, argv, words):
    folder, task = bases / "roberta", write(tmp_path / "a.jsonl", made)
    said = fail(capsys, "finetune", str(folder), *task, "--out", str(tmp_path / "run"), *argv)
    assert words.format(folder=folder) in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv, words", [
    (["nowhere"], "nowhere does not exist; give the folder of a run"),
    (["."], ". holds no trained model (no model.safetensors); `fastlm pretrain` trains one"),
    ([".", "--held-out", "x"], "--held-out x"),
    ([".", "--task", "x.csv"], "--task x.csv does not exist; give a file of labelled rows"),
    ([], "finetune needs a run's folder"),
])  # fmt: skip
def test_folders_that_are_none_are_refused(tmp_path, capsys, argv, words):
    assert words in fail(capsys, "finetune", *argv)


def test_a_label_that_was_not_trained_on_is_told(bases, tmp_path, capsys):
    task = write(tmp_path / "a.jsonl", labelled())
    write(tmp_path / "b.jsonl", [*labelled(9, seed=2), {"text": "Linus", "label": "Linus"}])
    assert cli.main(["finetune", str(bases / "roberta"), *task, "--held-out", str(tmp_path / "b.jsonl"), "--steps", "2",
                     "--out", str(tmp_path / "run"), *FAST]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "skipped  1 × a label that no row of the train side has: 'Linus'" in said and " 9 held out" in said

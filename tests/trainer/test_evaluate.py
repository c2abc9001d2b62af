"""`fastlm evaluate`, a text that is held out by itself, and flags from files."""

import json
import math
import re

import pytest
import torch
from runs import config, fail, flags, train, write_text

from fastlm.interop import from_huggingface
from fastlm.objectives import Causal
from fastlm.trainer import cli
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokenizer import load_tokenizer, vocabulary
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.outputs.metrics import read_rows


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.txt"
    write_text(path, seed=1, lines=60)
    return path


def result(out: str) -> dict[str, float]:
    """The numbers of the line of the result, by what stands after or before them."""
    line = next(line for line in out.splitlines() if line.startswith("result"))
    return {"nats": float(re.search(r"([\d.]+) nats", line)[1]), "line": line}


def test_a_text_is_measured_as_by_hand(text, other, tmp_path, capsys):
    """Over all of its tokens but the first: what rows of one token more than they predict give."""
    train(text, tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", str(other)]) == 0
    found = result(capsys.readouterr().out)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    ids = torch.tensor([*tokenizer.encode(other.read_text()).ids, 1])
    model = from_huggingface(tmp_path / "run").eval()
    rows = (len(ids) - 1) // 16
    inputs, labels = (ids[i : i + 16 * rows].view(rows, 16) for i in (0, 1))
    loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1).double(), labels.flatten()).item()
    assert found["nats"] == pytest.approx(loss, abs=1e-4)
    assert f"perplexity {math.exp(loss):.4g}"[:14] in found["line"] and "bits/byte" in found["line"]


@pytest.mark.parametrize("preset", ["bert", "t5", "electra", "transformer-xl"])
def test_every_kind_is_measured_by_what_it_learned(text, other, tmp_path, preset, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed in range(3):
        write_text(folder / f"{seed}.txt", seed, lines=200)
    train(folder, tmp_path / "run", preset=preset, steps=3)
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", str(folder), "--windows", "20"]) == 0
    assert result(capsys.readouterr().out)["nats"] > 0


def test_what_is_held_out_can_be_given(text, other, tmp_path, capsys):
    """All of it, and nothing of the text; a run says so, and evaluates to what `evaluate` finds."""
    corpus = find((text,), validation=(other,))
    assert list(corpus.documents(held_out=True)) == [other.read_text()]
    assert list(corpus.documents(held_out=False)) == [text.read_text()]
    assert corpus.fingerprint != find((text,)).fingerprint and "other.txt" in corpus.split
    assert len(tokenize(corpus, 300).held_out) > 100
    train(text, tmp_path / "run", validation=(other,))
    last = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in row][-1]
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", str(other)]) == 0
    assert result(capsys.readouterr().out)["nats"] == pytest.approx(last["held_out_loss"], abs=1e-4)
    assert "--validation" in fail(capsys, "pretrain", "--validation", str(tmp_path / "nowhere.txt"))


def test_what_cannot_be_measured_is_said(text, other, tmp_path, capsys):
    train(text, tmp_path / "run")
    capsys.readouterr()
    short = tmp_path / "short.txt"
    short.write_text("a")
    for words, said in [
        (["--data", str(short)], "fewer than one row of 16 + 1"),
        (["--context", "32"], "--context is 32, and the model was trained on 16"),
        (["--windows", "0"], "--windows is 0; it must be at least 1"),
        (["--data", str(tmp_path / "none")], "does not exist"),
    ]:
        assert said in fail(capsys, "evaluate", str(tmp_path / "run"), *words)


def test_flags_come_from_a_file(text, tmp_path, capsys):
    """A run's own run.json makes it again; a flag of the command line goes before one of the file."""
    train(text, tmp_path / "first")
    again = ["pretrain", "--config", str(tmp_path / "first" / "run.json"), "--out", str(tmp_path / "again")]
    assert cli.main(again) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps({"steps": 7, "kv-heads": 1, "hidden": 48, "betas": [0.8, 0.9], "from": None}))
    assert cli.main(["pretrain", *flags(config(text, tmp_path / "third", steps=3)), "--config", str(asked)]) == 0
    ran = json.loads((tmp_path / "third" / "run.json").read_text())
    assert ran["steps"] == 3 and ran["config"]["betas"] == [0.8, 0.9]
    shape = from_huggingface(tmp_path / "third").config
    assert (shape.kv_heads, shape.hidden) == (1, 48)


@pytest.mark.parametrize(
    "name, written, said",
    [
        ("a.json", '{"step": 3}', "names step, which is no flag of pretrain; did you mean steps?"),
        ("a.json", '{"plugin": ["x.py"]}', "which no file may choose; give --plugin on the command line"),
        ("a.json", "[1]", "holds no names"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"steps": "many"}', "--steps many is not a whole number"),
        ("a.json", '{"config": {"command": "finetune"}}', "is a run of `fastlm finetune`"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, capsys, name, written, said):
    path = tmp_path / name
    path.write_text(written)
    assert said in fail(capsys, "pretrain", "--config", str(path))


def test_the_file_must_be_there_and_one(tmp_path, capsys):
    assert "does not exist" in fail(capsys, "pretrain", "--config", str(tmp_path / "none.toml"))
    assert "takes one file" in fail(capsys, "pretrain", "--config")


def test_toml(text, tmp_path):
    pytest.importorskip("tomllib")
    path = tmp_path / "a.toml"
    path.write_text(f'data = ["{text}"]\nvocab = 300\ncontext = 16\ndim = 32\nheads = 2\nlayers = 1\nsteps = 2\n')
    assert cli.main(["pretrain", f"--config={path}", "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 2


def test_windows_are_those_of_the_objective(text):
    """What `evaluate` looks at is what the objective calls its fixed windows."""
    tokens = tokenize(find((text,)), 300)
    objective = Causal(tokens.held_out, 16, vocabulary(load_tokenizer(tokens.tokenizer_file)))
    assert objective.windows == (len(tokens.held_out) - 1) // 16

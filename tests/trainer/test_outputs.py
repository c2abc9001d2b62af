"""What a run says and leaves: lines, the line of progress, speeds, and commands that a shell takes as they are."""

import os
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import config, train, write_text

from fastlm.objectives import Causal
from fastlm.trainer import budget, step, words
from fastlm.trainer.outputs import lines
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.metrics import read_rows

LAST = {"loss": 3.4567, "lr": 0.0025, "grad_norm": 0.5, "held_out_loss": 3.5, "held_out_step": 100}


def said(shown: str, label: str) -> list[str]:
    return [line.removeprefix(f"{label:<8} ") for line in shown.splitlines() if line.startswith(label)]


def test_what_matters_most_comes_first():
    parts = lines.of_progress(1234, 2468, 65.0, 9600.0, LAST)
    assert parts[:-1] == [
        " 50%  1:05 left", "step 1,234", "loss 3.457", "held out 3.500", "lr 0.0025", "9.6k tok/s", "|g| 0.50"
    ]  # fmt: skip
    assert parts[-1].startswith("rss ")
    assert "held out 3.500 (step 0)" in lines.of_progress(7, 2468, 65.0, 9600.0, LAST | {"held_out_step": 0})


@pytest.mark.parametrize("columns, last", ((80, "9.6k tok/s"), (30, "step 1,234"), (10, " 50%  1:0"), (200, "GB")))
def test_a_terminal_shows_the_parts_that_fit(capsys, monkeypatch, columns, last):
    monkeypatch.setenv("COLUMNS", str(columns))
    console = Console()
    console.live = True
    console.progress(lines.of_progress(1234, 2468, 65.0, 9600.0, LAST))
    shown = capsys.readouterr().out.removeprefix("\r")
    assert len(shown) < columns and shown.endswith(last)
    console.say("held out", "kept")
    assert capsys.readouterr().out.endswith("\rheld out kept\n")


def test_an_evaluation_says_where_it_comes_from(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Causal, "looked_at", 4)
    assert train(text, tmp_path / "run", evaluations=1) == 0
    first, *_, last = said(capsys.readouterr().out, "held out")
    assert " · step 0 · " in first and first.endswith("4 of 18 windows")
    assert " · step 12 · " in last and last.endswith("all 18 windows")


def test_evaluations_do_not_slow_the_tokens(text, tmp_path, monkeypatch):
    evaluate = step.Trainer.evaluate

    def slow(self, *args, **options):
        time.sleep(0.5)
        return evaluate(self, *args, **options)

    monkeypatch.setattr(step.Trainer, "evaluate", slow)
    assert train(text, tmp_path / "run", steps=4, evaluations=4) == 0
    speeds = [row["tokens_per_second"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(speeds) == 4 and min(speeds) > 4 * 16 / 0.5


def test_the_model_is_said_with_its_size(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", steps=2) == 0
    (model,) = said(capsys.readouterr().out, "model")
    assert model == "llama · causal · 1 layer of 32 · 2 heads · context 16 · rope · 23k parameters"


def test_what_was_skipped_and_how_to_go_on(text, tmp_path, capsys):
    folder = tmp_path / "it's mine | here"
    (tmp_path / "data").mkdir()
    write_text(tmp_path / "data" / "good.txt", seed=1)
    (tmp_path / "data" / "bad.txt").write_bytes(bytes(10))
    assert train(tmp_path / "data", folder, steps=2) == 0
    shown = capsys.readouterr().out
    assert said(shown, "skipped") == ["1 × binary: bad.txt"] and " · 1 file · " in said(shown, "data")[0]
    command, opened = said(shown, "next")[0].split(" · weights open with ")
    assert shlex.split(command) == ["fastlm", "sample", str(folder)]
    assert eval(opened[opened.index("(") :]) == str(folder)
    report = (folder / "report.md").read_text()
    assert "| skipped | 1 × binary: bad.txt |" in report and "mine \\| here" in report


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text on this system")
def test_names_that_are_no_text_do_not_end_a_run(text, tmp_path):
    """As archives from other systems bring them."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"\xff"))
    folder.mkdir()
    write_text(folder / os.fsdecode(b"caf\xe9.txt"), seed=1)
    assert train(folder, tmp_path / os.fsdecode(b"run\xff"), steps=2) == 0


def test_a_slow_dtype_is_said_before_training(text, monkeypatch):
    bf16 = config(text, dtype="bf16", device="cpu")
    environment = dict(torch="", python="", device="")
    label, warning = list(lines.of_machine(bf16, environment, 3.04))[1]
    assert label == "warning" and warning.startswith("matrix products in bf16 take 3.0 times as long as in fp32")
    assert len(list(lines.of_machine(bf16, environment, 1.1))) == 1
    seconds = {torch.float32: 2.0, torch.bfloat16: 5.0}
    monkeypatch.setattr(budget, "_product_seconds", seconds.get)
    assert budget.dtype_cost(bf16) == 2.5 and budget.dtype_cost(config(text, dtype="fp32")) == 1


def test_words(tmp_path):
    assert [words.several(n, "file") for n in (0, 1, 1234)] == ["0 files", "1 file", "1,234 files"]
    assert [words.size(n) for n in (17905, 9.07e6)] == ["17.9 kB", "9.07 MB"]
    assert words.command("resume", Path("a b")) == "fastlm resume 'a b'"
    (tmp_path / "data").mkdir()
    assert (
        words.absent(tmp_path / "dat", "cure")
        == f"{tmp_path / 'dat'} does not exist; did you mean {tmp_path / 'data'}?"
    )
    assert words.absent(tmp_path / "else", "cure").endswith("does not exist; cure")

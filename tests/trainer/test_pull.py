"""Weights that are drawn back to where they began: by the formula, those alone that came from elsewhere, and as well
after a run was stopped.
"""

import json
import os
import shutil

import pytest
import torch
from dying import killed
from runs import TINY, config, fail, repeatable, train_in
from safetensors.torch import load_file

from fastlm.models.presets import preset
from fastlm.objectives import OBJECTIVES, Vocabulary
from fastlm.objectives.base import copy_weights
from fastlm.optim import OPTIMIZERS
from fastlm.trainer import checkpoint, cli
from fastlm.trainer.commands import run
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.memory import reckon
from fastlm.trainer.pull import Pull, starts_of
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Refusal

SHORT = ["--steps", "12", "--batch", "4", "--threads", "1", "--evaluations", "3", "--lr", "5e-3"]
ANEW = ("head.bias",)  # stands for a head that was not there


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Small runs to begin with, and their text."""
    runs = {preset: dict(preset=preset, steps=4) for preset in ("llama", "roberta")}
    return train_in(tmp_path_factory.mktemp("bases"), **runs)


@pytest.fixture
def tokens(text):
    return tokenize(find((text,)), TINY["vocab"])


def make(tokens, text, pull: float, **changes) -> Trainer:
    asked = dict(preset="bert", objective="mlm", layers=2, pull=pull, dropout=0.1)
    trainer = Trainer(config(text, **asked | changes), tokens, TINY["steps"])
    if pull:
        trainer.pull = Pull(pull, trainer.model, starts_of(trainer.model, ANEW))
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def pretraining(bases, folder, out, *more: str) -> list[str]:
    return ["pretrain", "--from", str(folder), "--data", str(bases / "text.txt"), "--out", str(out), *SHORT, *more]


# ---------------------------------------------------------------------------------------------------------------------
# What it does


def test_an_update_is_the_optimizers_and_then_the_formula(tokens, text):
    """Each group by its own rate; what was drawn anew is as without it, to the bit."""
    pulled, plain = (make(tokens, text, pull, layer_decay=0.5) for pull in (20.0, 0.0))
    start = {name: w.double() for name, w in weights(plain).items()}
    names = {p: name for name, p in plain.model.named_parameters()}
    for step in range(4):
        pulled.update(), plain.update()
        assert len({group["lr"] for group in plain.optimizer.param_groups}) == 4  # embeddings, two layers, the head
        with torch.no_grad():
            for group in plain.optimizer.param_groups:
                for p in group["params"]:
                    if names[p] not in ANEW:
                        p.copy_(p.double() - group["lr"] * 20.0 * (p.double() - start[names[p]]))
        found, expected = weights(pulled), weights(plain)
        for name in found:
            exact = dict(rtol=0, atol=0) if step == 0 and name in ANEW else dict(rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found[name], expected[name], **exact, msg=lambda m, name=name: f"{name}: {m}")
    assert set(ANEW) < start.keys()


def test_the_more_it_pulls_the_nearer_weights_stay(tokens, text):
    far = []
    for pull in (0.0, 10.0, 60.0, 200.0):
        trainer = make(tokens, text, pull)
        start = weights(trainer)
        while trainer.step < TINY["steps"]:
            trainer.update()
        ends = weights(trainer)
        far.append(sum((ends[name] - start[name]).square().sum().item() for name in start if name not in ANEW) ** 0.5)
    assert far[0] > 1.2 * far[1] > 1.2 * 1.2 * far[2] and far[2] > 1.2 * far[3] > 0, far


def broken(trainer: Trainer) -> None:
    """Have its next losses, and with them all gradients, be infinite."""
    ask = trainer.division.ask
    trainer.division.ask = lambda *args: {name: x * torch.inf for name, x in ask(*args).items()}


@pytest.mark.parametrize("optimizer, changes", [
    ("adamw", dict(dtype="fp16")),
    ("adamw", dict(dtype="fp16", clip=0.0)),
    ("adamw", {}),  # which skips for a norm that is not finite
    ("torchs", dict(dtype="fp16")),
], ids=["fp16", "fp16-unclipped", "fp32", "a-plugins-in-fp16"])  # fmt: skip
def test_a_skipped_update_pulls_nothing(tokens, text, monkeypatch, optimizer, changes):
    monkeypatch.setitem(OPTIMIZERS, "torchs", torch.optim.AdamW)
    trainer = make(tokens, text, 100.0, optimizer=optimizer, **changes)
    start = weights(trainer)
    for _ in range(3):
        trainer.update()
    before, ask = weights(trainer), trainer.division.ask
    assert not all(torch.equal(before[name], start[name]) for name in start)
    broken(trainer)
    trainer.update()
    assert all(torch.equal(w, before[name]) for name, w in weights(trainer).items())
    trainer.division.ask = ask
    trainer.update()
    assert not any(torch.equal(w, before[name]) for name, w in weights(trainer).items() if w.ndim > 1)


def test_starts_of_another_model_are_refused(tokens, text):
    trainer = make(tokens, text, 0.0)
    for name, shape in (("nowhere", (3,)), ("head.bias", (3,))):
        with pytest.raises(ValueError, match=rf"the model has no parameter {name} \[3\] to be drawn back"):
            Pull(1.0, trainer.model, [(name, torch.zeros(shape))])


def test_memory_counts_what_is_drawn_back_to(tokens, text):
    none, some = (reckon(config(text, pull=pull, layers=2), tokens.facts.vocab_size).model for pull in (0.0, 0.1))
    trainer = Trainer(config(text, layers=2), tokens, 1)
    assert some - none == sum(p.nbytes for p in trainer.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn back


def pulled_names(folder) -> set[str]:
    return set(load_file(folder / "state" / "start" / "model.safetensors"))


def test_a_new_head_is_left_alone(bases, tmp_path, capsys):
    rows = [{"text": f"{name} reads {i}", "label": name} for i in range(20) for name in ("Ada", "Alan")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["finetune", str(bases / "roberta"), "--task", str(tmp_path / "rows.jsonl"), *SHORT, "--pull", "20"]
    assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert "drawn anew · drawn back to them by 20 times the rate" in capsys.readouterr().out
    names = pulled_names(tmp_path / "run")
    whole = load_file(checkpoint.saved(tmp_path / "run" / "state")[0] / "model.safetensors")
    assert names == {name for name in whole if name.startswith("model.")} and len(names) < len(whole)


def test_what_an_objective_adds_is_left_alone(bases, tmp_path, capsys):
    argv = pretraining(bases, bases / "roberta", tmp_path / "run", "--objective", "span-boundary", "--pull", "20")
    assert cli.main(argv) == 0
    (begins,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("begins"))
    names = pulled_names(tmp_path / "run")
    assert names and all(name.startswith("model.") for name in names) and "drawn anew" in begins


def test_names_of_what_is_new_are_the_models_own():
    """Also where what is written for others is a part of it."""
    made = OBJECTIVES["replaced-tokens"](torch.full((200,), 7).numpy(), 16, Vocabulary(100))
    shape = preset("electra", vocab_size=100, dim=16, layers=1, heads=1, context=16, **made.shape)
    model, other = made.model(shape), made.model(shape)
    anew = made.begin_with(model, made.exported(other))
    kept = dict(starts_of(model, anew))
    assert kept and {id(p) for p in made.exported(model).parameters()} == {
        id(p) for name, p in model.named_parameters() if name in kept
    }
    assert any(name.startswith("generator.") for name in anew)
    assert copy_weights(model, other) == []


# ---------------------------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize("n, save_every", [(5, "1e9"), (9, "0")], ids=("before-any", "between"))
def test_killed_and_resumed_it_is_the_same_without_the_folder(bases, tmp_path, n, save_every):
    shutil.copytree(bases / "llama", tmp_path / "base")
    more = ["--pull", "30", "--layer-decay", "0.7", "--save-every", save_every]
    argv = lambda name: pretraining(bases, tmp_path / "base", tmp_path / name, *more)
    assert cli.main(argv("whole")) == 0
    killed("fastlm.trainer.outputs.metrics.Metrics.add", n, *argv("killed"))
    shutil.rmtree(tmp_path / "base")
    assert save_every != "0" or not (tmp_path / "killed" / "state" / "step-0").exists()
    assert run.resume(tmp_path / "killed") == 0
    assert repeatable(tmp_path / "killed") == repeatable(tmp_path / "whole")
    assert cli.main(pretraining(bases, bases / "llama", tmp_path / "free", *more[2:])) == 0
    assert repeatable(tmp_path / "free")[0] != repeatable(tmp_path / "whole")[0]


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def alter(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize("harm, words", [
    (cut, "model.safetensors has"), (alter, "model.safetensors was altered"),
    (os.unlink, "model.safetensors cannot be read"),
], ids=("cut", "altered", "deleted"))  # fmt: skip
def test_without_its_start_a_run_does_not_go_on(bases, tmp_path, harm, words):
    argv = pretraining(bases, bases / "llama", tmp_path / "run", "--pull", "30", "--save-every", "0")
    killed("fastlm.trainer.outputs.metrics.Metrics.add", 5, *argv)
    harm(tmp_path / "run" / "state" / "start" / "model.safetensors")
    with pytest.raises(Refusal, match=f"which --pull draws weights back to, is not whole .{words}.*start a new run"):
        run.resume(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("given, words", [
    (["--pull", "0.1"], "--pull 0.1 draws weights back to those that a run begins with, and this one begins with none"),
    (["--pull", "-1"], "--pull is -1.0; it must be at least 0"),
    (["--pull", "nan"], "--pull is nan; it must be a finite number"),
])  # fmt: skip
def test_no_start_and_no_number_are_refused(bases, tmp_path, capsys, given, words):
    said = fail(capsys, "pretrain", "--data", str(bases / "text.txt"), "--out", str(tmp_path / "run"), *given)
    assert words in said and not (tmp_path / "run").exists()


def test_what_would_go_beyond_the_start_is_refused(bases, tmp_path, capsys):
    said = fail(capsys, *pretraining(bases, bases / "llama", tmp_path / "run", "--pull", "300"))
    assert "--pull 300 times --lr 0.005 is 1.5; above 1, weights are drawn past where they began" in said
    assert not (tmp_path / "run").exists()

"""Every family trains on its own objective, from the command line's defaults to what it leaves behind."""

import pytest
import torch
from runs import config, fail, flags, repeatable, stop_before, train, write_text
from torch import nn

from fastlm.models import Transformer
from fastlm.models.presets import FAMILIES
from fastlm.objectives import recipe
from fastlm.trainer import budget
from fastlm.trainer.commands import run
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.options.config import Config
from fastlm.trainer.outputs.metrics import read_rows
from fastlm.trainer.step import Trainer

SHOWN = {
    "causal": "",
    "nsp": "→ B",
    "sop": "‖",
    "mlm": "[",
    "denoising": "→",
    "mass": "→",
    "permutation": "[",
    "replaced-tokens": "|",
    "span-corruption": "→",
}  # in a sample


@pytest.fixture
def text(text):
    """Three documents, for texts of a pair come from two."""
    folder = text.with_name("text")
    folder.mkdir()
    for seed in range(3):
        write_text(folder / f"{seed}.txt", seed, lines=200)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains(text, tmp_path, monkeypatch, name):
    """Its loss falls below the first, and the sample shows what its objective does."""
    monkeypatch.setattr(budget, "SAMPLE", 32)
    layers = 2 if FAMILIES[name].conv_width else 1  # DeBERTa v2's first and last do something of their own
    train(text, tmp_path / "run", preset=name, steps=30, lr=5e-3, evaluations=1, context=32, layers=layers)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert held_out[-1] < held_out[0] * 0.95, held_out
    sample = [row["sample"] for row in rows if "sample" in row][-1]
    assert sample and SHOWN[recipe(name)[0]] in sample


@pytest.mark.parametrize("name", ["bert", "t5", "electra", "deberta-v3"])
def test_resumed_is_bit_identical(text, tmp_path, monkeypatch, name):
    """Noise and dropout are functions of the step, so a run that was stopped ends as one that was not."""
    train(text, tmp_path / "whole", preset=name, steps=8, dropout=0.1)
    stop_before(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "parts", preset=name, steps=8, dropout=0.1, save_every=1e-9)
    run.resume(tmp_path / "parts", ())
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")


@pytest.mark.parametrize("name", ["bert", "albert", "electra", "deberta-v3"])
def test_accumulation_equals_one_large_batch(text, monkeypatch, name):
    """Each term of several is divided by its own targets in all micro-batches."""
    monkeypatch.setattr(Transformer, "train", lambda self, mode=True: nn.Module.train(self, False))  # without dropout
    tokens, found = tokenize(find((text,)), 300), []
    for batch in (8, 2):
        trainer = Trainer(config(text, preset=name, batch=batch, accumulate=8 // batch, context=32), tokens, 2)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda set_to_none: None)
        trainer.optimizer.grad_norm = None
        update = trainer.update()
        found.append((update, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])))
        weighted = [
            trainer.train.weights.get(term, 1.0) * x.item() for term, x in update.losses.items() if term != "loss"
        ]
        assert update.losses["loss"].item() == pytest.approx(sum(weighted), rel=1e-6)
    (one, whole), (cut, parts) = found
    assert one.losses.keys() == cut.losses.keys() and len(one.losses) == 3 and one.targets == cut.targets
    for term in one.losses:
        torch.testing.assert_close(cut.losses[term], one.losses[term], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


@pytest.mark.parametrize(
    "given, words",
    [
        (
            dict(preset="bert", objective="causal"),
            "--objective causal trains a model of kind decoder, and --preset bert",
        ),
        (dict(preset="gpt", objective="mlm"), "give --objective causal, or another --preset"),
        (dict(preset="bert", context=1), "rows of 1, of which 0.15 are not one target; give a larger --context"),
        (dict(preset="bert", objective="permutation"), "two_streams tell places apart in attention"),
    ],
)
def test_what_does_not_fit_is_refused(text, capsys, tmp_path, given, words):
    asked = Config(data=(text,), out=tmp_path / "run", steps=1, vocab=300, **given)
    assert words in fail(capsys, "pretrain", *flags(asked))


@pytest.mark.parametrize(
    "name, objective",
    [("llama", "prefix"), ("roberta", "span-boundary"), ("bert", "multitask-mlm"), ("bert", "contrastive")],
)
def test_an_objective_of_no_preset_trains(text, tmp_path, name, objective):
    train(text, tmp_path / "run", preset=name, objective=objective, steps=30, evaluations=1, context=32)
    held_out = [row["held_out_loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in row]
    assert held_out[-1] < held_out[0] * 0.95


def test_one_document_has_no_pairs(text, capsys, tmp_path):
    asked = Config(data=(text / "0.txt",), out=tmp_path / "run", steps=1, vocab=300, preset="bert")
    complaint = fail(capsys, "pretrain", *flags(asked))
    assert "has 1 document, and half of the pairs need another one; give 2 or more, or --objective mlm" in complaint

"""Every family trains on its own objective, from the command line's defaults to what it leaves behind."""

import pytest
from runs import fail, flags, repeatable, train, write_text

from fastlm.models.presets import FAMILIES
from fastlm.objectives import recipe
from fastlm.trainer import run
from fastlm.trainer.options.config import Config
from fastlm.trainer.outputs.metrics import read_rows

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
def test_every_family_trains(text, tmp_path, name):
    """Its loss falls below the first, and the sample shows what its objective does."""
    train(text, tmp_path / "run", preset=name, steps=30, lr=5e-3, evaluations=1, context=32)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert held_out[-1] < held_out[0] * 0.95, held_out
    sample = [row["sample"] for row in rows if "sample" in row][-1]
    assert sample and SHOWN[recipe(name)[0]] in sample


@pytest.mark.parametrize("name", ["bert", "t5", "electra", "deberta-v3", "xlnet", "bart"])
def test_resumed_is_bit_identical(text, tmp_path, monkeypatch, name):
    """Noise and dropout are functions of the step, so a run that was stopped ends as one that was not."""
    train(text, tmp_path / "whole", preset=name, steps=8)
    update, stopped = run.Trainer.update, []

    def stop_at_five(self):
        if self.step == 5 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(run.Trainer, "update", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "parts", preset=name, steps=8, save_every=1e-9)
    run.resume(tmp_path / "parts", ())
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")


@pytest.mark.parametrize(
    "given, words",
    [
        (
            dict(preset="bert", objective="causal"),
            "--objective causal trains a model of kind decoder, and --preset bert",
        ),
        (dict(preset="gpt", objective="mlm"), "give --objective causal, or another --preset"),
        (dict(preset="bert", context=3), "rows of 3, of which 0.15 are not one target; give a larger --context"),
    ],
)
def test_what_does_not_fit_is_refused(text, capsys, tmp_path, given, words):
    config = Config(data=(text,), out=tmp_path / "run", steps=1, vocab=300, **given)
    assert words in fail(capsys, "pretrain", *flags(config))

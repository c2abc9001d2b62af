"""Runs that begin with trained weights: what they begin with, what of it may be asked otherwise, and that they need it
no more once they have begun.
"""

import json
import shutil

import pytest
import torch
from dying import killed
from runs import TINY, config, fail, flags, repeatable, stop_before, train, train_in
from safetensors.torch import load_file

from fastlm.interop import from_huggingface, to_huggingface
from fastlm.trainer import cli
from fastlm.trainer.commands import run
from fastlm.trainer.commands.start import preset_of
from fastlm.trainer.outputs.metrics import read_rows
from fastlm.trainer.words import Refusal

# what the folder of --from says otherwise
OWN = dict.fromkeys(("vocab", "context", "dim", "layers", "heads"))


def asked(text, out, folder, **changes) -> list[str]:
    """The command line that begins with a folder's weights."""
    words = flags(config(text, out, **changes | {"from_": folder}))
    for name in OWN:
        place = words.index(f"--{name}")
        del words[place : place + 2]
    return ["pretrain", *words]


def held_out(folder) -> list[float]:
    return [row["held_out_loss"] for row in read_rows(folder / "metrics.jsonl") if "held_out_loss" in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, on a text equal to every test's own."""
    return train_in(tmp_path_factory.mktemp("trained"), run=dict(position="t5", steps=40)) / "run"


def test_it_begins_where_the_other_ended_and_goes_on(text, tmp_path, trained, capsys):
    assert cli.main(asked(text, tmp_path / "run", trained, steps=40)) == 0
    before, after = held_out(trained), held_out(tmp_path / "run")
    assert after[0] == pytest.approx(before[-1], rel=1e-6) and after[-1] < before[-1]
    said = capsys.readouterr().out
    assert f"begins   with the weights of {trained}\n" in said and " · t5 · " in said
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    rates = [row["lr"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "lr" in row]
    assert rates[0] < rates[1] == max(rates)  # it climbs again


def test_it_begins_with_what_an_interrupted_run_saved(text, tmp_path, monkeypatch):
    """All of it, the generator of ELECTRA too."""
    stop_before(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "one", preset="electra", save_every=0.0)
    assert cli.main(asked(text, tmp_path / "two", tmp_path / "one", save_every=1e9, lr=0.0)) == 0
    ends = [load_file(tmp_path / "one" / "state" / "step-7" / "model.safetensors")]
    ends += [load_file(tmp_path / "two" / "state" / f"step-{n}" / "model.safetensors") for n in (0, TINY["steps"])]
    assert any(name.startswith("generator.") for name in ends[0])
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    assert json.loads((tmp_path / "two" / "run.json").read_text())["config"]["preset"] == "electra"


@pytest.mark.parametrize("moment, n, save_every", [
    ("fastlm.trainer.outputs.metrics.Metrics.add", 5, 1e9),  # before the first checkpoint of its own
    ("fastlm.trainer.outputs.metrics.Metrics.add", 9, 0.0),
], ids=("before-any", "between"))  # fmt: skip
def test_killed_and_resumed_it_is_the_same_whatever_became_of_the_other(text, tmp_path, trained, moment, n, save_every):
    shutil.copytree(trained, tmp_path / "other")
    assert cli.main(asked(text, tmp_path / "whole", tmp_path / "other", save_every=save_every)) == 0
    killed(moment, n, *asked(text, tmp_path / "killed", tmp_path / "other", save_every=save_every))
    shutil.rmtree(tmp_path / "other")
    assert run.resume(tmp_path / "killed") == 0
    assert repeatable(tmp_path / "killed") == repeatable(tmp_path / "whole")


def test_without_the_weights_that_it_began_with_it_does_not_go_on(text, tmp_path, trained):
    argv = asked(text, tmp_path / "run", trained, save_every=1e9)
    killed("fastlm.trainer.outputs.metrics.Metrics.add", 5, *argv)
    shutil.rmtree(tmp_path / "run" / "state")
    with pytest.raises(Refusal, match="holds no whole checkpoint, and the weights that the run began with were there"):
        run.resume(tmp_path / "run")


def test_a_run_that_did_not_begin_leaves_nothing(text, tmp_path, trained):
    killed("fastlm.trainer.plan.write_file", 1, *asked(text, tmp_path / "run", trained))
    assert (tmp_path / "run" / "state").exists()
    shutil.rmtree(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlm.trainer.commands.ready.Metrics", lambda *a: (_ for _ in ()).throw(Refusal("no")))
        assert cli.main(asked(text, tmp_path / "run", trained)) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv, words", [
    (["--dim", "64"], "--dim 64 contradicts --from {folder}, which has 32; leave it out"),
    (["--vocab", "2048"], "--vocab 2048 contradicts --from {folder}, which has 300"),
    (["--position", "rope"], "--position rope contradicts --from {folder}, which has t5"),
    (["--preset", "bert"], "--preset bert contradicts --from {folder}, which has llama"),
    (["--objective", "mlm"], "--objective mlm trains a model of kind encoder"),
    (["--from", "nowhere"], "--from nowhere does not exist; give the folder of a run"),
    (["--from", __file__], "is a file; give the folder of a run"),
    (["--from", "."], ". holds no trained model (no model.safetensors)"),
])  # fmt: skip
def test_what_contradicts_the_folder_is_refused(text, tmp_path, trained, capsys, argv, words):
    given = [] if "--from" in argv else ["--from", str(trained)]
    said = fail(capsys, "pretrain", "--data", str(text), "--out", str(tmp_path / "run"), *given, *argv)
    assert words.format(folder=trained) in said
    assert not (tmp_path / "run").exists()


def test_what_agrees_with_the_folder_is_taken(text, tmp_path, trained):
    same = ["--dim", "32", "--vocab", "300", "--position", "t5", "--preset", "llama", "--dropout", "0.1"]
    assert cli.main([*asked(text, tmp_path / "run", trained, steps=2), *same]) == 0
    assert from_huggingface(tmp_path / "run").config.dropout == 0.1


def test_a_folder_that_transformers_can_open(text, tmp_path, trained):
    """Of which no run.json says what it learned."""
    assert train(text, tmp_path / "albert", preset="albert", steps=4) == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "albert" / name, tmp_path / "theirs")
    assert cli.main(asked(text, tmp_path / "run", tmp_path / "theirs", objective="mlm", steps=2)) == 0
    made = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (made["preset"], made["dim"], made["shape"]["pair_labels"]) == ("albert", 32, 2)
    assert from_huggingface(tmp_path / "run").config.pair_labels == 0  # mlm has no use for it


def test_a_head_that_is_not_there_is_drawn_anew(text, tmp_path, capsys):
    assert train(text, tmp_path / "roberta", preset="roberta", steps=2) == 0
    model = from_huggingface(tmp_path / "roberta")
    base = type(model)(type(model.config)(**model.config.__dict__ | dict(head="none")))
    base.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("head.")})
    to_huggingface(base, tmp_path / "base", pad_token_id=0)
    shutil.copy(tmp_path / "roberta" / "tokenizer.json", tmp_path / "base")
    capsys.readouterr()
    assert cli.main(asked(text, tmp_path / "run", tmp_path / "base", steps=2)) == 0
    (begins,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("begins"))
    assert set(begins.split(" · ")[1].split(" drawn")[0].split(", ")) == {
        "head", "head.transform.linear", "head.transform.norm"
    }  # fmt: skip


def test_a_tokenizer_is_needed_and_must_be_ours(text, tmp_path, trained, capsys):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    file = other / "tokenizer.json"
    made = json.loads(file.read_text())
    made["added_tokens"][0]["content"] = "[PAD]"
    made["model"]["vocab"]["[PAD]"] = made["model"]["vocab"].pop("<pad>")
    file.write_text(json.dumps(made))
    assert f"{file} is no tokenizer of fastlm's, whose ids 0 to 4" in fail(capsys, "pretrain", "--from", str(other))
    file.unlink()
    assert f"{file} is missing" in fail(capsys, "pretrain", "--from", str(other))


def test_ids_that_an_objective_adds_must_be_there(text, tmp_path, capsys):
    assert train(text, tmp_path / "bart", preset="bart", steps=2) == 0
    said = fail(capsys, *asked(text, tmp_path / "run", tmp_path / "bart", objective="span-corruption"))
    assert "has 300 ids, and --objective span-corruption needs 400" in said


def test_a_preset_is_found_for_every_model():
    from fastlm.models.presets import FAMILY, PRESETS

    for name in ("bert", "bert-base", "albert", "roberta-large", "gpt2-medium", "t5", "bart", "xlnet", "electra"):
        assert FAMILY[preset_of(PRESETS[name])] == FAMILY[name]
    assert preset_of(PRESETS["bert-large"]) == "bert-large" and preset_of(PRESETS["mass"]) in PRESETS

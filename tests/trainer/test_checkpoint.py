"""Whatever happens to a run or to its files, it goes on to the same bits, or says in one line why it cannot."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from dying import killed
from runs import TINY, config, flags, repeatable, train, train_in, write_text
from safetensors import safe_open

from fastlm.models import Recurrence
from fastlm.trainer import checkpoint, cli, plan
from fastlm.trainer.commands import run
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Failure, Refusal

LONG = dict(steps=16, dropout=0.1, accumulate=2, save_every=0.0)  # a checkpoint after every step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run to compare with, on a text equal to every test's own."""
    return train_in(tmp_path_factory.mktemp("whole"), run=LONG) / "run"


@pytest.mark.parametrize("moment, n, save_every", [
    ("fastlm.trainer.outputs.metrics.Metrics.add", 9, 1e9),  # before the first checkpoint
    ("fastlm.trainer.outputs.metrics.Metrics.add", 11, 0.0),  # between checkpoints
    ("fastlm.trainer.checkpoint.save_file", 3, 0.0),  # in the middle of writing one
    ("fastlm.trainer.checkpoint.shutil.rmtree", 2, 0.0),  # while removing an old one
    ("fastlm.trainer.outputs.artefacts.write_plot", 1, 0.0),  # after the last step, before the last file
], ids=("before-any", "between", "writing", "removing", "at-the-end"))  # fmt: skip
def test_killed_and_resumed_is_bit_identical(text, tmp_path, whole, moment, n, save_every):
    folder = tmp_path / "killed"
    asked = config(text, folder, **LONG | dict(save_every=save_every))
    killed(moment, n, "pretrain", *flags(asked))
    assert run.resume(folder) == 0
    assert repeatable(folder) == repeatable(whole)
    assert not list((folder / "state").glob(".tmp-*"))
    assert checkpoint.saved(folder / "state")[0].name == f"step-{LONG['steps']}"


def test_killed_and_resumed_it_remembers_what_it_did(text, tmp_path):
    """The memory of the rows before is a part of what a checkpoint holds, of each micro-batch."""
    asked = LONG | dict(preset="transformer-xl", steps=9)
    assert train(text, tmp_path / "whole", **asked) == 0
    command = ["pretrain", *flags(config(text, tmp_path / "killed", **asked))]
    killed("fastlm.trainer.outputs.metrics.Metrics.add", 7, *command)
    assert len(checkpoint.remembered(tmp_path / "killed" / "state" / "step-6", torch.device("cpu"))) == 2
    assert run.resume(tmp_path / "killed") == 0
    assert repeatable(tmp_path / "killed") == repeatable(tmp_path / "whole")


def test_killed_before_its_first_step_there_is_nothing_to_resume(text, tmp_path):
    killed("fastlm.trainer.plan.write_file", 1, "pretrain", *flags(config(text, tmp_path / "run")))
    with pytest.raises(Refusal, match="stopped before its first step"):
        run.resume(tmp_path / "run")


def stop_at(folder, text, step, **changes):
    """A run that stops itself after `step`, as Ctrl-C does."""
    real = Trainer.update

    def update(trainer):
        done = real(trainer)
        if trainer.steps == changes.get("steps", LONG["steps"]) and trainer.step == step:
            signal.raise_signal(signal.SIGINT)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        assert train(text, folder, **LONG | changes) == 128 + signal.SIGINT


def test_what_was_saved_can_be_sampled(text, tmp_path, capsys):
    folder = tmp_path / "run"
    stop_at(folder, text, 7)
    capsys.readouterr()
    assert cli.main(["sample", str(folder), "--tokens", "5", "--prompt", "Ada"]) == 0
    said = capsys.readouterr()
    assert f"{folder} holds no model.safetensors; these are its weights after step 7 of 16" in said.err
    assert said.out.startswith("Ada") and said.out.endswith("\n")
    shutil.rmtree(folder / "state")
    assert cli.main(["sample", str(folder)]) == 2
    assert f"(no whole checkpoint in state/); `fastlm resume {folder}` goes on" in capsys.readouterr().err


def test_stopped_twice_and_resumed_is_bit_identical(text, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    stop_at(folder, text, 7)
    assert f"fastlm resume {folder}" in capsys.readouterr().out
    assert run.resume(folder) == 0
    assert repeatable(folder) == repeatable(whole)


def test_fp16_resumes_with_its_loss_scale(text, tmp_path):
    fp16 = dict(dtype="fp16", dropout=0.1, steps=16, accumulate=1)
    train(text, tmp_path / "whole", **LONG | fp16)
    stop_at(tmp_path / "run", text, 9, **fp16)
    state = tmp_path / "run" / "state" / "step-9" / "state.json"
    assert json.loads(state.read_text())["scaler"]["_growth_tracker"] == 9
    assert run.resume(tmp_path / "run") == 0
    assert repeatable(tmp_path / "run") == repeatable(tmp_path / "whole")


def test_when_checkpoints_are_written_changes_nothing(text, tmp_path, whole):
    train(text, tmp_path / "rarely", **LONG | dict(save_every=1e9))
    assert repeatable(tmp_path / "rarely") == repeatable(whole)


@pytest.mark.parametrize("clip", (0.0, 1.0))
def test_what_diverged_is_never_a_checkpoint(text, tmp_path, monkeypatch, clip):
    """Weights that are not finite end the run before they push the last good ones out; and what is written stays
    JSON.
    """
    real = Trainer.update

    def update(trainer):
        if trainer.steps == LONG["steps"] and trainer.step == 9:
            trainer.model.decoder.norm.weight.data.fill_(math.nan)
        return real(trainer)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(Failure, match="start a new run with a lower --lr"):
        train(text, tmp_path / "run", **LONG | dict(clip=clip, evaluations=0))
    assert [p.name for p in checkpoint.saved(tmp_path / "run" / "state")] == ["step-9", "step-8"]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    last = json.loads(rows.splitlines()[-1])
    assert (
        "NaN" not in rows
        and last["step"] == 10
        and last["loss"] is last["grad_norm"] is None
        and last["skipped"] == (1 if clip else None)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_a_run_belongs_to_one_process(text, tmp_path):
    stop_at(tmp_path / "run", text, 3)
    with plan.locked(tmp_path / "run"), pytest.raises(Refusal, match="another process is at work"):
        run.resume(tmp_path / "run")
    with plan.new_folder(tmp_path / "new"):
        for _ in range(2):  # the one that was refused takes nothing away
            with pytest.raises(Refusal, match="another process is at work"):
                train(text, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan.time, "strftime", lambda how: "now")
    with plan.new_folder(None) as one, plan.new_folder(None) as two:
        (two / "run.json").write_text("{}")
    assert (one.name, two.name) == ("now", "now-2") and os.listdir("runs") == ["now-2"]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def alter(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def overwrite(path):
    path.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("harm", (cut, overwrite, os.unlink))
def test_a_run_goes_on_without_its_metrics(text, tmp_path, whole, harm):
    """Curves begin anew; the weights are the same."""
    folder = tmp_path / "run"
    stop_at(folder, text, 7)
    harm(folder / "metrics.jsonl")
    assert run.resume(folder) == 0
    assert repeatable(folder)[0] == repeatable(whole)[0]


@pytest.mark.parametrize("change", (dict(dim=16), dict(optimizer="sgd"), dict(lr="x")), ids=str)
def test_a_run_that_was_altered_is_refused(text, tmp_path, change):
    folder = tmp_path / "run"
    stop_at(folder, text, 3)
    values = json.loads((folder / "run.json").read_text())
    values["config"] |= change
    (folder / "run.json").write_text(json.dumps(values))
    with pytest.raises(Refusal, match=r"run.json is not what the run began with .*; restore it, or start a new run"):
        run.resume(folder)


@pytest.mark.parametrize("harm", (cut, alter, os.unlink), ids=("cut", "altered", "deleted"))
@pytest.mark.parametrize("name", (*checkpoint.FILES, checkpoint.RECURRENCE, checkpoint.MANIFEST))
def test_damage_is_seen_in_every_file(tmp_path, name, harm):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    recurrence = Recurrence(4)
    recurrence.extend(0, torch.ones(1, 2, 3))
    for step in (8, 9):
        checkpoint.save(tmp_path, step, model, optimizer.state_dict()["state"], {}, [recurrence])
    harm(tmp_path / "step-9" / name)
    heard = []
    assert checkpoint.newest(tmp_path, heard.append) == tmp_path / "step-8"
    assert len(heard) == 1 and "step-9 is damaged" in heard[0] and "\n" not in heard[0]
    checkpoint.save(tmp_path, 9, model, optimizer.state_dict()["state"], {}, [recurrence])
    assert checkpoint.newest(tmp_path, heard.append) == tmp_path / "step-9" and len(heard) == 1


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(text, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    stop_at(folder, text, 9)
    cut(folder / "state" / "step-9" / "model.safetensors")
    capsys.readouterr()
    assert run.resume(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("step-9 is damaged" in line for line in lines) == 1 and any(
        "from step 8 of 16" in line for line in lines
    )
    assert repeatable(folder) == repeatable(whole)


def test_without_a_whole_checkpoint_a_run_starts_over(text, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    stop_at(folder, text, 9)
    for saved in checkpoint.saved(folder / "state"):
        cut(saved / "model.safetensors")
    assert run.resume(folder) == 0
    assert "from step 0 of 16" in capsys.readouterr().out
    assert repeatable(folder) == repeatable(whole)


def test_rows_after_the_checkpoint_and_half_a_row_are_dropped(text, tmp_path, whole):
    folder = tmp_path / "run"
    stop_at(folder, text, 9)
    shutil.rmtree(folder / "state" / "step-9")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    assert run.resume(folder) == 0
    assert repeatable(folder) == repeatable(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_changed_data_is_refused(text, tmp_path):
    stop_at(tmp_path / "run", text, 3)
    write_text(text, seed=1)
    with pytest.raises(Refusal, match=r"--data .*text\.txt changed since the run began: its SHA-256 was"):
        run.resume(tmp_path / "run")


def test_data_that_went_is_refused(text, tmp_path):
    stop_at(tmp_path / "run", text, 3)
    text.unlink()
    with pytest.raises(Refusal, match="does not exist"):
        run.resume(tmp_path / "run")


def test_another_tokenizer_is_refused(text, tmp_path):
    stop_at(tmp_path / "run", text, 3)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    with pytest.raises(Refusal, match="not the one the run began with"):
        run.resume(tmp_path / "run")


def test_a_lost_cache_does_not_matter(text, tmp_path, whole):
    stop_at(tmp_path / "run", text, 3)
    shutil.rmtree(tmp_path / "cache")
    assert run.resume(tmp_path / "run") == 0
    assert repeatable(tmp_path / "run") == repeatable(whole)


def test_a_finished_run_says_so(text, tmp_path, capsys):
    train(text, tmp_path / "run")
    before = repeatable(tmp_path / "run")
    assert run.resume(tmp_path / "run") == 0
    assert "is finished" in capsys.readouterr().out and repeatable(tmp_path / "run") == before


@pytest.mark.parametrize("content", (None, "{", "{}", "[]", '{"config": {"lr": 1}}'))
def test_what_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(Refusal) as refused:
        run.resume(tmp_path)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_files_hold_no_pickle_and_a_tied_matrix_once(text, tmp_path):
    train(text, tmp_path / "run")
    (folder,) = checkpoint.saved(tmp_path / "run" / "state")
    assert sorted(p.name for p in folder.iterdir()) == sorted((*checkpoint.FILES, checkpoint.MANIFEST))
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [tuple(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118 (not a dict)
    assert shapes.count((TINY["vocab"], TINY["dim"])) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_umasks_mode(text, tmp_path):
    """Those of safetensors too, which makes its own readable for their owner alone."""
    before = os.umask(0o027)
    try:
        train(text, tmp_path / "run", steps=2)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o640}


def test_two_are_kept(text, tmp_path):
    train(text, tmp_path / "run", save_every=0.0)
    assert [p.name for p in checkpoint.saved(tmp_path / "run" / "state")] == ["step-12", "step-11"]


def test_every_tensor_of_the_optimizer_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer, fresh = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, 1, model, optimizer.state_dict()["state"], {"note": 1})
    assert checkpoint.restore(tmp_path / "step-1", model, fresh) == {"step": 1, "note": 1}
    for p in model.parameters():
        torch.testing.assert_close(fresh.state[p], optimizer.state[p], rtol=0, atol=0)

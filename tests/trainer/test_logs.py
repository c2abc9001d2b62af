"""Rows that go to TensorBoard or Weights & Biases too: where they are asked for, and nowhere else."""

import importlib.util
import sys
import types

import pytest
from runs import config, fail, stop_before, train

from fastlm.trainer.commands import run
from fastlm.trainer.outputs.logs import LOGS, numbers
from fastlm.trainer.outputs.metrics import read_rows


@pytest.fixture
def installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name in ("wandb",) or find(name, *more))


class Wandb(types.ModuleType):
    """A wandb that remembers what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", LOGS)
def test_what_is_not_installed_is_refused(text, tmp_path, capsys, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package, *more: None if package == name else find(package))
    said = fail(capsys, "pretrain", "--data", str(text), "--log", name, "--out", str(tmp_path / "run"))
    assert f"--log {name} needs {name}, not installed here; cure: pip install {name}" in said
    assert not (tmp_path / "run").exists()


def test_wandb_is_told_every_row_and_offline(text, tmp_path, monkeypatch, installed):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.delenv("WANDB_MODE")
    assert train(text, tmp_path / "run", log="wandb", steps=3) == 0
    import os

    assert os.environ["WANDB_MODE"] == "offline" and wandb.finished == 1
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in wandb.rows] == [row["step"] for row in rows]
    for (_, told), row in zip(wandb.rows, rows, strict=True):
        assert numbers(told) == numbers(row) and told.get("sample", "") == row.get("sample", "")
    (begun,) = wandb.begun
    assert begun["dir"] == str(tmp_path / "run") and begun["config"]["steps"] == 3


def test_a_resumed_run_is_the_same_one(text, tmp_path, monkeypatch, installed):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    stop_before(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "run", log="wandb", steps=3, save_every=0.0)
    assert wandb.finished == 1
    assert run.resume(tmp_path / "run") == 0
    assert len({begun["id"] for begun in wandb.begun}) == 1 and len(wandb.begun) == wandb.finished == 2
    updates = [step for step, values in wandb.rows if "loss" in values]
    assert updates == [1, 2, 3]


def test_tensorboard_holds_every_number(text, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(text, tmp_path / "run", log="tensorboard", steps=3) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == [1, 2, 3]
    assert [value for _, value in found] == pytest.approx([row["loss"] for row in rows])


def test_none_is_opened_unasked(text, tmp_path):
    assert config(text).log == "none" and train(text, tmp_path / "run", steps=1) == 0
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}

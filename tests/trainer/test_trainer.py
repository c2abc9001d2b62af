"""The training step: what it computes does not depend on how a batch is cut, and everything is a function of the
step.
"""

import math
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import TINY, config, repeatable, train
from safetensors.torch import load_file

from fastlm.backends.dispatch import SlowPathWarning
from fastlm.objectives import IGNORED, OBJECTIVES, Causal
from fastlm.optim import OPTIMIZERS
from fastlm.positions import SCHEMES
from fastlm.trainer import loop
from fastlm.trainer.budget import Looks, affordable, due, measure
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.evaluation import total
from fastlm.trainer.options.training import LR
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.metrics import GIVE_UP, Metrics, read_rows
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Failure


class Ragged(Causal, name="ragged"):
    """Causal, with row r of the data losing its last r mod 13 targets, so that micro-batches differ in their counts."""

    def batch(self, seed, first, count):
        batch = super().batch(seed, first, count)
        for row, number in enumerate(range(first, first + count)):
            batch["labels"][row, self.context - number % 13 :] = IGNORED
        return batch


del OBJECTIVES["ragged"]  # the tests' own; no flag names it


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that share a busy machine wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokens(text):
    return tokenize(find((text,)), TINY["vocab"])


def make(tokens, text, **changes) -> Trainer:
    return Trainer(config(text, **changes), tokens, changes.get("steps", TINY["steps"]))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ---------------------------------------------------------------------------------------------------------------------
# One step


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_optimizer_of_torch_in_the_registry_trains_as_ours_does(tokens, text, monkeypatch, dtype):
    """As a plugin may put it there: the trainer clips for it, and its groups follow the schedule."""
    monkeypatch.setitem(OPTIMIZERS, "torch's", torch.optim.AdamW)
    ends = []
    for optimizer in ("adamw", "torch's"):
        trainer = make(tokens, text, optimizer=optimizer, clip=0.1, dtype=dtype)
        norms = [trainer.update().norm for _ in range(4)]
        assert min(norms) > 0.1
        ends.append([*norms, weights(trainer)])
    tolerance = dict(rtol=1e-4, atol=1e-6) if dtype == "fp32" else dict(rtol=1e-2, atol=1e-3)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("micro", (1, 2, 4, 8))
def test_accumulation_equals_one_large_batch(tokens, text, monkeypatch, micro):
    """Gradients of 8 rows as one batch, and as micro-batches whose target counts differ (Popel; transformers' bug of
    2024).
    """
    monkeypatch.setitem(OBJECTIVES, "causal", Ragged)
    gradients = {}
    for batch in (8, micro):
        trainer = make(tokens, text, batch=batch, accumulate=8 // batch, clip=0.0)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda set_to_none: None)
        trainer.optimizer.grad_norm = trainer.optimizer.overflow = None
        update = trainer.update()
        gradients[batch] = (
            torch.cat([p.grad.flatten() for p in trainer.model.parameters()]),
            update.losses["loss"],
            update.targets,
        )
    (one, loss, n), (cut, cut_loss, cut_n) = gradients[8], gradients[micro]
    assert n == cut_n < 8 * TINY["context"]
    torch.testing.assert_close(cut_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(cut, one, rtol=1e-4, atol=1e-6 * one.abs().max().item())


def test_first_loss_is_ln_v(tokens, text):
    assert make(tokens, text).evaluate()["loss"] == pytest.approx(math.log(TINY["vocab"]), rel=0.02)


def test_dropout_is_a_function_of_seed_and_step(tokens, text):
    one, other, third = (make(tokens, text, dropout=0.3, seed=seed) for seed in (1, 1, 2))
    third.model.load_state_dict(one.model.state_dict())
    third.train.batch = lambda seed, *numbers: one.train.batch(1, *numbers)
    first = one.update().losses["loss"]
    torch.rand(100)  # somebody else draws
    assert other.update().losses["loss"] == first != third.update().losses["loss"]
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def test_a_trainer_continues_at_any_step(tokens, text):
    """No state but weights, optimizer and step: what another trainer did before does not show."""
    one, other = make(tokens, text, dropout=0.1), make(tokens, text, dropout=0.1)
    for _ in range(3):
        one.update()
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    other.step = 3
    for _ in range(3):
        assert one.update().losses["loss"] == other.update().losses["loss"]
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def test_gradient_is_clipped_and_reported_before_clipping(tokens, text):
    free, clipped = make(tokens, text, clip=0.0), make(tokens, text, clip=1e-3)
    assert free.update().norm is None  # null in metrics.jsonl
    assert clipped.update().norm > 1e-3


def test_evaluation_sees_every_held_out_window_once(tokens, text):
    trainer = make(tokens, text)
    found = trainer.evaluate()
    with torch.no_grad():
        each = [
            trainer.held_out.loss(trainer.model, trainer.held_out.fixed(np.array([i])))["loss"].item()
            for i in range(trainer.held_out.windows)
        ]
    n = trainer.held_out.windows * TINY["context"]
    assert found["loss"] == pytest.approx(sum(each) / n, rel=1e-5)
    size = tokens.bytes_of()[tokens.held_out[1 : n + 1]].sum()
    assert found["bits_per_byte"] == pytest.approx(sum(each) / math.log(2) / size, rel=1e-5)


def test_evaluation_and_sampling_leave_training_alone(tokens, text):
    one, other = make(tokens, text, dropout=0.1), make(tokens, text, dropout=0.1)
    for _ in range(3):
        one.update(), other.update()
        other.evaluate(), other.sample(8)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def test_sample_is_the_same_at_the_same_step(tokens, text):
    trainer = make(tokens, text)
    first = trainer.sample(8)
    assert trainer.sample(8) == first
    trainer.step += 1
    assert trainer.sample(8) != first


def test_total():
    assert total([{"a": 1}, {"a": 2, "b": 5}, {}]) == {"a": 3, "b": 5}


# ---------------------------------------------------------------------------------------------------------------------
# When things are due


@pytest.mark.parametrize("steps, times", ((20, 4), (7, 4), (3, 10), (1, 1), (100, 10), (10, 0)))
def test_due_steps_are_spread_and_include_the_last(steps, times):
    chosen = [step for step in range(1, steps + 1) if due(step, steps, times)]
    assert len(chosen) == min(steps, times) and (not chosen or chosen[-1] == steps)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize("position", sorted(SCHEMES))
def test_every_position_trains(text, tmp_path, position):
    assert train(text, tmp_path / "run", position=position, steps=20) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_half_precision_trains(text, tmp_path, dtype):
    train(text, tmp_path / "run", dtype=dtype, steps=10)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 10 and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["loss_scale"] == (65536 if dtype == "fp16" else 1)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in saved.values())


def test_an_overflow_is_skipped_and_logged(tokens, text):
    trainer = make(tokens, text, dtype="fp16")
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    before = weights(trainer)
    update = trainer.update()
    assert update.overflow == 1 and torch.equal(weights(trainer), before) and trainer.scaler.get_scale() == 2.0**39


def test_same_seed_same_bits_and_other_seed_other_bits(text, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(text, tmp_path / name, seed=seed)
    a, b, c = (repeatable(tmp_path / name) for name in "abc")
    assert a == b and a[0] != c[0] and a[1] != c[1]


def test_divergence_is_a_failure_in_words(text, tmp_path):
    with pytest.raises(Failure, match=r"start a new run with a lower --lr \(1e\+30\)"):
        train(text, tmp_path / "run", lr=1e30, clip=0.0, warmup=0.0)


@pytest.mark.parametrize("steps", (12, 200))
def test_a_run_that_skips_its_updates_fails(text, tmp_path, steps):
    """Weights that are huge and finite, and gradients that are not: most updates are skipped, or many in a row."""
    with pytest.raises(
        Failure, match=r"\d+ of \d+ updates were skipped, .* training diverged; .* lower --lr \(1e\+20\)"
    ):
        train(text, tmp_path / "run", lr=1e20, warmup=0.0, weight_decay=0.0, steps=steps)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) < 60 and sum(row["skipped"] for row in rows) > len(rows) / 2


def test_a_few_skipped_updates_are_no_failure(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    row = dict(loss=1.0, held_out_loss=None)
    for step in range(1, 41):
        metrics.write(row | dict(step=step, skipped=float(step % 2 or step < 20)))
        assert not metrics.skipping(steps=80)
    assert metrics.skipping(steps=40)
    again = Metrics(tmp_path / "metrics.jsonl", 39)
    assert again.skipped == metrics.skipped and not again.skipping(steps=40)
    for step in range(40, 39 + GIVE_UP):  # step 39 was the first
        assert not again.skipping(steps=80)
        again.write(row | dict(step=step, skipped=1.0))
    assert again.skipping(steps=80)


def test_a_run_that_learns_nothing_fails(text, tmp_path, capsys):
    assert train(text, tmp_path / "a", lr=0.0, steps=loop.JUDGED_FROM) == 1
    assert "not below the unigram line" in capsys.readouterr().out
    assert train(text, tmp_path / "b", lr=0.0, steps=loop.JUDGED_FROM - 1) == 0


def test_a_run_that_learns_succeeds(text, tmp_path):
    assert train(text, tmp_path / "run", steps=loop.JUDGED_FROM, lr=1e-2) == 0


def test_minutes_fix_the_steps(tokens, text):
    short, long = (measure(replace(config(text), steps=None, minutes=m), tokens) for m in (1e-5, 0.3))
    assert short.steps == 1 and not short.fits and long.steps > 50 and long.fits


def test_looks_leave_time_for_the_steps(tokens, text, monkeypatch):
    """On a busy machine, evaluations that take longer than all the minutes leave more than one step."""
    Trainer(config(text), tokens, 1).update()  # the first of a process takes as long as what it loads
    evaluate, sample = Trainer.evaluate, Trainer.sample
    monkeypatch.setattr(Trainer, "evaluate", lambda self, n: time.sleep(0.1 * n) or evaluate(self, n))
    monkeypatch.setattr(Trainer, "sample", lambda self, n: time.sleep(0.02 * n) or sample(self, n))
    budget = measure(replace(config(text), steps=None, minutes=0.1, evaluations=12), tokens)
    assert budget.fits and budget.steps > 1 and budget.looks.seconds(0.1, 0.02) < 0.1 * 60 * 0.31


def test_measuring_leaves_time_for_the_steps(tokens, text, monkeypatch):
    """On a busy machine an update takes half a second, and what is measured is measured within a share of 6 seconds."""
    Trainer(config(text), tokens, 1).update()
    update, updates = Trainer.update, []
    monkeypatch.setattr(Trainer, "update", lambda self: time.sleep(0.5) or updates.append(1) or update(self))
    evaluate, windows = Trainer.evaluate, []
    monkeypatch.setattr(Trainer, "evaluate", lambda self, n: windows.append(n) or evaluate(self, n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    budget = measure(replace(config(text), steps=None, minutes=0.1, threads=None), tokens)
    assert len(updates) <= 4 and sum(windows) <= 8
    assert budget.fits and budget.steps >= 4


@pytest.mark.parametrize("seconds, looks", [
    (1000.0, Looks(12, 64, 500, 96)),  # as asked: 13 · 64 - 64 + 500 windows, 4 · 96 tokens
    (1270 * 0.1 + 0.384 * 2, Looks(12, 64, 500, 96)),
    (1267 * 0.1 + 0.384, Looks(0, 64, 500, 96)),
    (500 * 0.1, Looks(0, 64, 240, 96)),
    (30.0, Looks(0, 59, 59, 96)),
    (0.5, Looks(0, 1, 1, 62)),
    (0.0, Looks(0, 1, 1, 1)),
    (-5.0, Looks(0, 1, 1, 1)),
])  # fmt: skip
def test_looks_that_are_affordable(seconds, looks):
    found = affordable(Looks(12, 64, 500, 96), window=0.1, token=0.001, seconds=seconds)
    assert found == looks
    if seconds > 0.5:
        assert found.seconds(0.1, 0.001) <= seconds


def test_looks_are_counted():
    assert [Looks(n, 1, 1, 1).times for n in (0, 1, 4, 3, 12, 5)] == [4, 4, 4, 6, 12, 8]
    assert Looks(12, 64, 500, 96).seen == 12 * 64 + 500


def test_a_budget_that_is_too_small_is_said(text, tmp_path, capsys):
    train(text, tmp_path / "run", steps=None, minutes=1e-5)
    assert "--minutes 1e-05 is too short for one step" in capsys.readouterr().out


def test_rate_and_decay_are_the_optimizers_unless_asked(text):
    sgd = config(text, optimizer="sgd", lr=None, weight_decay=None).settled()
    assert (sgd.lr, sgd.weight_decay) == (LR["sgd"], 0.0)
    asked = config(text, optimizer="sgd", lr=0.0, weight_decay=0.2).settled()
    assert (asked.lr, asked.weight_decay) == (0.0, 0.2)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_trains_at_its_own_rate(text, tmp_path, optimizer):
    assert train(text, tmp_path / "run", optimizer=optimizer, lr=None, weight_decay=None, steps=20) == 0
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.2


def test_warnings_are_labelled_lines(capsys):
    with Console().warnings(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("slow\n  path", SlowPathWarning, stacklevel=1)
    shown = capsys.readouterr()
    assert shown.out == "warning  slow path\n" and not shown.err


def test_threads_are_probed(tokens, text):
    torch.set_num_threads(2)
    budget = measure(config(text, threads=None), tokens)
    assert set(budget.speeds) == {1, 2} and torch.get_num_threads() == budget.threads


def test_row_numbers(text, tmp_path):
    train(text, tmp_path / "run", accumulate=2)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, TINY["steps"] + 1))
    per_step = 2 * TINY["batch"] * TINY["context"]
    assert [row["tokens"] for row in rows] == [per_step * s for s in range(1, TINY["steps"] + 1)]
    assert all(row["targets"] == per_step and row["skipped"] == 0 and row["grad_norm"] > 0 for row in rows)
    assert np.isfinite([[row["seconds"], row["memory"], row["lr"]] for row in rows]).all()

"""A model that remembers the rows before: each update goes on with the text of the last one, whatever came between."""

import numpy as np
import pytest
import torch
from runs import TINY, config, fail, flags, repeatable, stop_before, train

from fastlm.models import Remembering
from fastlm.trainer.commands import run
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.memory import reckon
from fastlm.trainer.outputs.lines import of_model, of_progress
from fastlm.trainer.signals import Stopped
from fastlm.trainer.step import Trainer

STILL = dict(preset="transformer-xl", lr=0.0, weight_decay=0.0)  # weights that stay as they are
CONTEXT, BATCH = TINY["context"], TINY["batch"]


@pytest.fixture
def tokens(text):
    return tokenize(find((text,)), TINY["vocab"])


def make(tokens, text, **changes) -> Trainer:
    return Trainer(config(text, **STILL | changes), tokens, 100)


def states(trainer: Trainer) -> list[torch.Tensor]:
    """Of each layer, [micro-batches · rows, memory, dim]."""
    return [torch.cat(parts) for parts in zip(*(r.states for r in trainer.recurrences), strict=True)]


def test_updates_read_each_stream_as_one_text(tokens, text):
    """Where memory holds all that came before, four updates have the losses of four parts of one long row."""
    trainer = make(tokens, text, memory=4 * CONTEXT)
    found = [trainer.update().losses["loss"] for _ in range(4)]
    batches = [trainer.train.batch(0, step * BATCH, BATCH) for step in range(4)]
    whole = {name: torch.cat([batch[name] for batch in batches], 1) for name in batches[0]}
    assert (whole["inputs"][:, 1:] == whole["labels"][:, :-1]).all()
    logits = trainer.model(whole["inputs"])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), whole["labels"], reduction="none")
    torch.testing.assert_close(torch.stack(found), each.unflatten(1, (4, CONTEXT)).mean((0, 2)), rtol=1e-5, atol=0)


def test_memory_is_as_long_as_a_row_unless_it_is_given(tokens, text, capsys):
    trainer = make(tokens, text)
    lengths = []
    for _ in range(3):
        trainer.update()
        lengths.append([len(r) for r in trainer.recurrences])
    assert lengths == [[CONTEXT]] * 3
    assert "memory 16" in "   ".join(next(iter(of_model(trainer.config, tokens))))
    assert "memory 16" in of_progress(1, 2, 0.0, 1.0, {"held_out_loss": 1.0, "held_out_step": 1}, memory=16)
    short, none = make(tokens, text, memory=5), make(tokens, text, memory=0)
    short.update(), none.update()
    assert [len(r) for r in short.recurrences] == [5] and none.recurrences == []


def test_no_row_sees_what_its_neighbours_remember(tokens, text):
    """Another text in one stream changes no bit of what the others remember."""
    one, other = make(tokens, text, memory=24), make(tokens, text, memory=24)
    real = other.train.batch

    def changed(seed, first, count):
        batch = real(seed, first, count)
        batch["inputs"][1] = 299 - batch["inputs"][1]
        return batch

    other.train.batch = changed
    for _ in range(3):
        one.update(), other.update()
    for mine, yours in zip(states(one), states(other), strict=True):
        same = (mine == yours).flatten(1).all(1)
        assert same.tolist() == [True, False, True, True]


def test_each_micro_batch_remembers_its_own_rows(tokens, text):
    one, cut = make(tokens, text), make(tokens, text, batch=BATCH // 2, accumulate=2)
    for _ in range(3):
        torch.testing.assert_close(one.update().losses["loss"], cut.update().losses["loss"], rtol=1e-6, atol=0)
    assert len(cut.recurrences) == 2
    for mine, yours in zip(states(one), states(cut), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-6)


def test_an_epoch_begins_with_an_empty_memory(tokens, text):
    trainer = make(tokens, text, memory=5 * CONTEXT)
    steps, held = len(trainer.train) // BATCH, []
    trainer.step = steps - 3
    trainer.recurrences = [trainer.model.new_recurrence()]
    for _ in range(5):
        trainer.update()
        held.append(len(trainer.recurrences[0]) // CONTEXT)
    assert held == [1, 2, 3, 1, 2]


def test_a_stop_inside_an_update_leaves_the_memory_of_the_last_one(tokens, text):
    trainer = make(tokens, text, batch=BATCH // 2, accumulate=2)
    trainer.update()
    before, calls = states(trainer), []

    def check():
        calls.append(None)
        if len(calls) == 2:
            raise Stopped("stopped", 130)

    trainer.check = check
    with pytest.raises(Stopped):
        trainer.update()
    assert all(torch.equal(mine, yours) for mine, yours in zip(states(trainer), before, strict=True))


@pytest.mark.parametrize("windows", (None, 7))
def test_an_evaluation_reads_stretches_of_text_with_a_memory_of_its_own(tokens, text, windows):
    trainer = make(tokens, text)
    trainer.update()
    before = states(trainer)
    found, there = trainer.evaluate(windows), trainer.held_out.windows
    assert all(torch.equal(mine, yours) for mine, yours in zip(states(trainer), before, strict=True))
    sums, seen = 0.0, []
    for row in range(BATCH):
        model = Remembering(trainer.model, trainer.model.new_recurrence())
        n = (windows or there) * (row + 1) // BATCH - (windows or there) * row // BATCH
        for number in range(row * there // BATCH, row * there // BATCH + n):
            seen.append(number)
            with torch.no_grad():
                sums += trainer.held_out.loss(model, trainer.held_out.fixed(np.array([number])))["loss"].item()
    assert len(set(seen)) == len(seen) == (windows or there)
    assert found["loss"] == pytest.approx(sums / len(seen) / CONTEXT, rel=1e-5)


@pytest.mark.parametrize("accumulate", (1, 2))
def test_resumed_is_bit_identical(text, tmp_path, monkeypatch, accumulate):
    options = dict(preset="transformer-xl", steps=8, dropout=0.1, accumulate=accumulate)
    train(text, tmp_path / "whole", **options)
    stopped = stop_before(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "parts", save_every=1e-9, **options)
    assert not stopped[0].train.begins(5 * BATCH * accumulate)  # its rows go on
    run.resume(tmp_path / "parts", ())
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")


def test_memory_counts_where_bytes_are_reckoned(text):
    none, some, more = (reckon(config(text, **STILL, memory=n), 300).rows for n in (0, CONTEXT, 4 * CONTEXT))
    assert none < some < more


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(preset="bert", memory=8), "--memory is 8, and no row of --objective nsp goes on where another ended"),
        (dict(preset="gpt", memory=8), "--memory 8 is of rows before, of which --position learned says nothing"),
        (dict(preset="transformer-xl", memory=-1), "--memory is -1; it must be at least 0"),
        (dict(preset="transformer-xl", batch=10**4), "fewer than 10000 streams of text; give more text"),
    ],
)
def test_what_cannot_remember_is_refused(text, capsys, tmp_path, given, words):
    assert words in fail(capsys, "pretrain", *flags(config(text, tmp_path / "run", **given)))

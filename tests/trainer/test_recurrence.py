"""A model that remembers the rows before: each update goes on with the text of the last one, whatever came between."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dying import killed
from runs import TINY, config, fail, flags, repeatable, stop_before, train

from fastlm.interop import to_huggingface
from fastlm.models import Remembering
from fastlm.objectives import IGNORED
from fastlm.trainer import checkpoint, cli
from fastlm.trainer.commands import run
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.memory import reckon
from fastlm.trainer.options.config import Config
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


def test_xlnet_reads_each_stream_as_one_text_of_which_a_part_sees_none_that_follow(tokens, text):
    """Four updates have the losses of four parts of one long row, in which each part's ranks are above the last's."""
    trainer = make(tokens, text, preset="xlnet", layers=2, memory=4 * CONTEXT)
    found = [trainer.update().losses["loss"] for _ in range(4)]
    batches = [trainer.train.batch(0, step * BATCH, BATCH) for step in range(4)]
    targets = batches[0]["places"].shape[1]
    shifts = {"inputs": 0, "labels": 0, "types": 0, "places": CONTEXT, "ranks": targets + 1}  # from part to part
    whole = {
        name: torch.cat([batch[name] + step * by for step, batch in enumerate(batches)], 1)
        for name, by in shifts.items()
    }
    assert (whole["types"] == 0).all() and (whole["labels"] != IGNORED).all()
    states = trainer.model.states(
        whole["inputs"], ranks=whole["ranks"], predicted=whole["places"], token_types=whole["types"]
    )  # fmt: skip
    each = F.cross_entropy(trainer.model.head(states).transpose(1, 2), whole["labels"], reduction="none")
    torch.testing.assert_close(torch.stack(found), each.unflatten(1, (4, targets)).mean((0, 2)), rtol=1e-5, atol=0)


def test_xlnet_remembers_as_transformers_does(tokens, text, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
    trainer = make(tokens, text, preset="xlnet", layers=2, memory=24)
    to_huggingface(trainer.model, tmp_path / "xlnet")
    theirs, mems = transformers.XLNetLMHeadModel.from_pretrained(tmp_path / "xlnet").eval(), None
    for step in range(3):
        batch = trainer.train.batch(0, step * BATCH, BATCH)
        ranks, places = batch["ranks"], batch["places"]
        own = torch.zeros_like(ranks).scatter(1, places, 1)
        perm_mask = (ranks[:, None, :] > (ranks - own)[:, :, None]).float()
        expected = theirs(
            batch["inputs"], mems=mems, perm_mask=perm_mask, target_mapping=F.one_hot(places, CONTEXT).float(),
            token_type_ids=batch["types"], use_mems=True,
        )  # fmt: skip
        mems = expected.mems
        loss = F.cross_entropy(expected.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        torch.testing.assert_close(trainer.update().losses["loss"], loss.detach(), rtol=1e-5, atol=0)
        for mine, yours in zip(states(trainer), mems, strict=True):
            torch.testing.assert_close(mine, yours.transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert len(trainer.recurrences[0]) == 24


def test_xlnet_remembers_where_it_is_asked_to_and_in_its_papers_sizes():
    """All of a row, for the next one begins where it ended."""
    small, asked, paper = (Config(preset=p, memory=n) for p, n in (("xlnet", None), ("xlnet", 8), ("xlnet-base", None)))
    shapes = [each.model(300) for each in (small, asked, paper)]
    assert [(shape.memory, shape.memory_reuse) for shape in shapes] == [(0, None), (8, None), (384, None)]
    each = zip((small, asked, paper), shapes, strict=True)
    assert [config.remembers(shape) for config, shape in each] == [False, True, True]


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


@pytest.mark.parametrize("preset", ("transformer-xl", "xlnet"))
@pytest.mark.parametrize("windows", (None, 7))
def test_an_evaluation_reads_stretches_of_text_with_a_memory_of_its_own(tokens, text, windows, preset):
    trainer = make(tokens, text, preset=preset, memory=CONTEXT)
    trainer.update()
    before = states(trainer)
    found, there = trainer.evaluate(windows), trainer.held_out.windows
    assert all(torch.equal(mine, yours) for mine, yours in zip(states(trainer), before, strict=True))
    sums, targets, seen = 0.0, 0, []
    for row in range(BATCH):
        model = Remembering(trainer.model, trainer.model.new_recurrence())
        n = (windows or there) * (row + 1) // BATCH - (windows or there) * row // BATCH
        for number in range(row * there // BATCH, row * there // BATCH + n):
            seen.append(number)
            batch = trainer.held_out.fixed(np.array([number]))
            targets += trainer.held_out.targets(batch)["loss"]
            with torch.no_grad():
                sums += trainer.held_out.loss(model, batch)["loss"].item()
    assert len(set(seen)) == len(seen) == (windows or there)
    assert found["loss"] == pytest.approx(sums / targets, rel=1e-5)


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


def test_xlnet_killed_and_resumed_from_the_command_line_is_bit_identical(text, tmp_path, capsys):
    options = dict(preset="xlnet", memory=24, accumulate=2, dropout=0.1, save_every=0.0)
    asked = lambda name: ["pretrain", *flags(config(text, tmp_path / name, **options))]
    assert cli.main(asked("whole")) == 0
    said = capsys.readouterr().out
    assert "permutation · " in said and said.count("memory 24") > 1  # of the model, and on the way
    killed("fastlm.trainer.outputs.metrics.Metrics.add", 9, *asked("parts"))
    assert (checkpoint.saved(tmp_path / "parts" / "state")[0] / checkpoint.RECURRENCE).exists()
    assert run.resume(tmp_path / "parts", ()) == 0
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")


@pytest.mark.parametrize("preset", ("transformer-xl", "xlnet"))
def test_memory_counts_where_bytes_are_reckoned(text, preset):
    lengths = (0, CONTEXT, 4 * CONTEXT)
    none, some, more = (reckon(config(text, **STILL | dict(preset=preset, memory=n)), 300).rows for n in lengths)
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

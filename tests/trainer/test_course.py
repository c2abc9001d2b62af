"""What changes on the way through a run: larger batches, longer rows, another rate of hidden tokens. Each is a function
of the update, on any number of ranks and after any interruption.
"""

import math

import pytest
import torch
from runs import config, fail, repeatable, stop_before, train
from sharded import on
from test_distributed import equals_one_process, run_alone

from fastlm.objectives import Masked
from fastlm.objectives.noise.masking import Masking
from fastlm.trainer.commands import run
from fastlm.trainer.course import Course
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokenizer import bare_vocabulary
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.outputs.metrics import read_rows
from fastlm.trainer.step import Trainer

GROWS = dict(preset="bert", objective="mlm", accumulate=4, batch_ramp=0.5, lengths=("8:0.3", "12:0.6"), batch=3,
             objective_options=("first_rate=0.5", "rate=0.2"), schedule_by="tokens", steps=10)  # fmt: skip


def trainer(text, **changes) -> Trainer:
    asked = config(text, **GROWS | changes).settled()
    asked.check()
    return Trainer(asked, tokenize(find((text,)), asked.vocab), asked.steps)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_grows_linearly_in_the_tokens_seen():
    """Brown et al. 2020: from 32 k tokens to the full batch over the first billions of tokens."""
    course = Course(4000, batch=2, accumulate=64, ramp=0.5)
    sizes = [course.micro_batches(step) for step in range(4000)]
    assert sizes[0] == 1 and sizes[2000:] == [64] * 2000 and sizes == sorted(sizes)
    whole = course.rows_before(2000)
    for step in range(0, 2000, 50):
        line = 1 + 63 * course.rows_before(step) / whole
        assert abs(sizes[step] - line) < 1.5


@pytest.mark.parametrize("ramp", (0.0, 0.25, 1.0))
def test_rows_are_those_of_all_updates_before(ramp):
    course = Course(40, batch=3, accumulate=5, ramp=ramp, ends=(0.1, 0.55))
    rows = [3 * course.micro_batches(step) for step in range(40)]
    stages = [0] * 4 + [1] * 18 + [2] * 18
    for step in range(41):
        assert course.rows_before(step) == sum(rows[:step])
        of = [sum(n for n, stage in zip(rows[:step], stages, strict=False) if stage == i) for i in range(3)]
        assert course.rows_of_stages(step) == of
    assert [course.stage(step) for step in range(40)] == stages


def test_no_sample_is_left_out_or_seen_twice(text, monkeypatch):
    grown, seen = trainer(text, lengths=(), objective_options=()), []
    batch = grown.train.batch
    monkeypatch.setattr(grown.train, "batch", lambda *numbers: seen.append(numbers[1:]) or batch(*numbers))
    updates = [grown.update() for _ in range(10)]
    assert seen == [(3 * i, 3) for i in range(len(seen))] and len(seen) == 1 + 1 + 2 + 2 + 3 + 5 * 4
    assert [u.tokens for u in updates[:3]] == [48, 48, 96] and updates[-1].seen == 29 * 48 == grown.tokens_before(10)


def test_a_schedule_may_count_tokens(text):
    rates = {}
    for by in ("tokens", "updates"):
        grown = trainer(text, schedule="linear", warmup=0.0, min_lr_ratio=0.0, lr=1.0, schedule_by=by, lengths=())
        rates[by] = []
        for step in range(10):
            grown.step = step
            rates[by].append(grown.lr())
            done = grown.tokens_before(step) / grown.tokens_before(10) if by == "tokens" else step / 10
            assert rates[by][-1] == pytest.approx(1 - done)
    assert rates["tokens"][3] > rates["updates"][3]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_rows_get_longer(text):
    grown = trainer(text, batch_ramp=0.0, objective_options=(), accumulate=1)
    lengths = []
    for step in range(10):
        lengths.append(grown.objective().context)
        assert grown.update().tokens == 3 * lengths[step]
    assert lengths == [8] * 3 + [12] * 3 + [16] * 4
    assert grown.tokens_before(10) == 3 * sum(lengths)


def test_spans_are_cut_for_the_rows_of_each_stage(text):
    """T5's raw lengths follow from a row's."""
    grown = trainer(text, preset="t5", objective="preset", objective_options=(), context=24, lengths=("16:0.5",))
    short, long = (objective.batch(0, 0, 2) for objective in grown.stages)
    assert (short["inputs"].shape[1], long["inputs"].shape[1]) == (16, 24)
    grown.update()


# ---------------------------------------------------------------------------------------------------------------------
# Hidden tokens


def test_the_rate_of_hidden_tokens_is_a_line():
    masking = Masking(rate=0.1, first_rate=0.5)
    assert [masking.at(x).rate for x in (0.0, 0.5, 1.0)] == pytest.approx([0.5, 0.3, 0.1])
    assert Masking(rate=0.1).at(0.3).rate == 0.1
    with pytest.raises(ValueError, match="rate is 2"):
        Masking(rate=0.1, first_rate=2.0).check(20)


def test_fewer_tokens_are_hidden_later_and_as_many_held_out(text):
    grown = trainer(text, lengths=(), batch_ramp=0.0, accumulate=1)
    hidden = [grown.update().targets / 3 for _ in range(10)]
    assert hidden == [round(16 * (0.5 - 0.3 * step / 10)) for step in range(10)]
    assert grown.held_out.fixed(range(2))["labels"].shape[1] == round(0.2 * 16)


def test_a_rate_that_stays_costs_no_copy():
    objective = Masked(torch.arange(400).numpy() % 90 + 10, 16, bare_vocabulary(100))
    assert objective.at(0.3) is objective


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize("step", (2, 4))
def test_resumed_is_bit_identical(text, tmp_path, monkeypatch, step):
    assert train(text, tmp_path / "whole", **GROWS, dropout=0.1) == 0
    stop_before(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "parts", save_every=0.0, **GROWS, dropout=0.1)
    assert run.resume(tmp_path / "parts") == 0
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")
    tokens = [row["tokens"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if "loss" in row]
    sizes = [max(1, round(4 ** (s / 5))) if s < 5 else 4 for s in range(10)]
    lengths = [8] * 3 + [12] * 3 + [16] * 4
    assert tokens == [sum(3 * n * m for n, m in zip(sizes[:s], lengths, strict=False)) for s in range(1, 11)]


WHOLE = GROWS | dict(context=32, dropout=0.0)


def grows(rank: int, world: int, text, one) -> None:
    equals_one_process(rank, world, text, one, shard="none", **WHOLE)


@on(3)
def test_every_number_of_ranks_takes_the_same_rows(ranks, text, tmp_path):
    run_alone(text, tmp_path / "one", **WHOLE)
    ranks.run(grows, text, tmp_path / "one")


def test_minutes_are_filled(text):
    """As many updates as take the time of so many of the largest."""
    asked = config(text, **GROWS)
    for largest in (100, 1000):
        steps = asked.updates_in(largest, 16)
        course = asked.course(steps)
        tokens = sum(n * m for n, m in zip(course.rows_of_stages(steps), asked.contexts(16), strict=True))
        assert tokens / (3 * 4 * 16) == pytest.approx(largest, rel=0.02) and steps > 1.3 * largest
    assert config(text).updates_in(100, 16) == 100 and asked.updates_in(0, 16) == 0


@pytest.mark.parametrize("argv, words", (
    (["--batch-ramp", "0.5"], "--batch-ramp 0.5 leads to --accumulate 1, where it begins"),
    (["--batch-ramp", "2", "--accumulate", "4"], "--batch-ramp is 2.0; it is a share, from 0 to 1"),
    (["--lengths", "long"], "--lengths long is no TOKENS:SHARE, such as 128:0.9"),
    (["--lengths", "32:0.5", "64:0.5"], "--lengths 32:0.5 64:0.5: shares of the updates rise, between 0 and 1"),
    (["--lengths", "32:1"], "shares of the updates rise"),
    (["--lengths", "256:0.5"], "--lengths 256 is no row of 1 to --context 128 tokens"),
    (["--preset", "bert", "--lengths", "2:0.5"], "--lengths 2, --objective nsp: rows of 2"),
    (["--preset", "transformer-xl", "--lengths", "32:0.5"], "--lengths changes which rows go on where others ended"),
    (["--objective-options", "rate=0.3"], "--objective-options rate is unknown of --objective causal"),
    (["--preset", "roberta", "--objective-options", "rate=2"], "--objective mlm: rate is 2.0"),
    (["--preset", "roberta", "--objective-options", "first_rate=0.001"], "are not one target"),
    (["--preset", "roberta", "--objective-options", "rounds=1.5"], "rounds is 1.5"),
))  # fmt: skip
def test_what_no_run_can_have_is_refused(capsys, argv, words):
    assert words in fail(capsys, "pretrain", *argv)


def test_one_micro_batch_is_the_least():
    assert [Course(3, 1, 1, 1.0).micro_batches(s) for s in range(3)] == [1, 1, 1]
    assert math.prod(Course(1, 1, 9, 0.4).micro_batches(s) for s in range(1)) == 9

"""Recipes by name: GPT-3's own numbers come out of its shares."""

import pytest
from runs import fail

from fastlm.models.presets import PRESETS
from fastlm.trainer.options.config import Config
from fastlm.trainer.options.files import expanded
from fastlm.trainer.options.flags import parse
from fastlm.trainer.options.recipes import RECIPES


def asked(*argv: str) -> Config:
    return parse(Config, "pretrain", expanded(list(argv), Config, "pretrain"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_configuration(name):
    config = asked("--config", name)
    config.check_values()
    assert config.preset == name and (config.betas, config.clip, config.weight_decay) == ((0.9, 0.95), 1.0, 0.1)


@pytest.mark.parametrize("name, batch, lr, ramp", (
    ("gpt3-125m", 0.5e6, 6e-4, 4e9), ("gpt3-1.3b", 1e6, 2e-4, 4e9), ("gpt3-13b", 2e6, 1e-4, 4e9),
    ("gpt3-175b", 3.2e6, 0.6e-4, 12e9),
))  # fmt: skip
def test_gpt3s_tokens(name, batch, lr, ramp):
    """Brown et al. 2020, table 2.1 and app. B: batches from 32 k tokens, 300 billion tokens in all, 375 million of them
    warmup, and a cosine down to 10 % by 260 billion.
    """
    config = asked("--config", name)
    course, context = config.course(config.steps), PRESETS[name].context
    tokens = lambda step: course.rows_before(step) * context
    assert tokens(1) == 2**15 and config.lr == lr
    assert course.micro_batches(config.steps) * config.batch * context == pytest.approx(batch, rel=0.06)
    assert tokens(config.steps) == pytest.approx(300e9, rel=1e-3)
    assert tokens(round(config.batch_ramp * config.steps)) == pytest.approx(ramp, rel=0.02)
    assert config.warmup * 300e9 == pytest.approx(375e6)
    assert config.curve()(moment(config, 200e9)) > config.curve()(moment(config, 260e9)) == pytest.approx(0.1, abs=1e-4)


def moment(config: Config, tokens: float):
    from fastlm.trainer.schedule import Moment

    return Moment(tokens, tokens, 300e9, config.warmup * 300e9, config.min_lr_ratio)


def test_a_flag_wins_over_its_recipe():
    config = asked("--config", "gpt3", "--accumulate", "8", "--steps", "20")
    assert (config.accumulate, config.steps, config.schedule_by) == (8, 20, "tokens")


def test_names_that_are_no_recipe_are_refused(capsys):
    assert "gpt3-175b; did you mean gpt3?" in fail(capsys, "pretrain", "--config", "gpt")
    assert "is a recipe of `fastlm pretrain`" in fail(capsys, "finetune", "somewhere", "--config", "gpt3")

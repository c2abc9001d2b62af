"""What presets learn, and what small models are trained with instead of their papers' settings."""

import pytest

from fastlm.models.presets import FAMILIES, PRESETS
from fastlm.objectives import OBJECTIVES, recipe, small
from fastlm.objectives.recipes import SMALL
from fastlm.trainer.options.config import Config
from fastlm.trainer.options.training import LR

POST = {name for name, row in FAMILIES.items() if row.norm_place == "post"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_objective_of_its_kind(name):
    assert OBJECTIVES[recipe(name)[0]].kind == PRESETS[name].kind


def test_paper_sizes_keep_their_papers_settings():
    assert recipe("bert-base") == ("nsp", {}) and recipe("roberta-large") == ("mlm", {})
    assert recipe("electra-large")[1] == {"rate": 0.25} and small("bart-base") is None
    assert Config(preset="bert-base").model(300) == Config(preset="bert-base", context=512, dropout=0.1).model(300)


@pytest.mark.parametrize("name", FAMILIES)
def test_small_models_are_trained_without_dropout(name):
    shape = Config(preset=name).model(300)
    assert not any((shape.dropout, shape.attention_dropout, shape.activation_dropout, shape.final_dropout))
    assert not shape.position_options.get("dropout")
    assert Config(preset=name, dropout=0.3).model(300).dropout == 0.3


@pytest.mark.parametrize("name", [name for name in SMALL if FAMILIES[name].kind != "decoder"])
def test_what_sees_both_sides_is_trained_on_short_rows(name):
    assert Config(preset=name).model(300).context < FAMILIES[name].context
    assert Config(preset=name, context=96).model(300).context == 96


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_after_a_branch_bear_less(name):
    rate = Config(preset=name).settled().lr
    assert rate < LR["adamw"] if name in POST else rate == LR["adamw"]
    assert Config(preset="bert").settled().lr == 0.4 * LR["adamw"]
    assert Config(preset="bert", lr=3e-3).settled().lr == 3e-3

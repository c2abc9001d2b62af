"""What presets learn, and what small models are trained with instead of their papers' settings."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastlm.interop import model_type
from fastlm.models import Transformer
from fastlm.models.presets import FAMILIES, PRESETS
from fastlm.objectives import OBJECTIVES, recipe, small
from fastlm.objectives.recipes import SMALL
from fastlm.objectives.vocabulary import Vocabulary
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


def test_more_rows_where_a_row_says_little_unless_they_are_asked_for():
    rows = {name: Config(preset=name).settled().batch for name in FAMILIES}
    assert {name: n for name, n in rows.items() if n != 8} == {"bert": 32, "albert": 32}
    assert Config(preset="bert", batch=5).settled().batch == 5
    assert Config(preset="bert-base").settled().batch == 8


@pytest.mark.parametrize("name", ["bert", "albert", "bart"])
def test_small_models_that_compare_places_are_shallow_and_begin_with_sines(name):
    shape = Config(preset=name).model(300)
    assert shape.layers == 2 and shape.init.endswith("-sines")
    assert Config(preset=name, layers=3).model(300).layers == 3
    assert model_type(shape) == name  # transformers opens it


def test_positions_begin_as_sines_as_large_as_what_they_are_added_to():
    """Products of two of them depend on the distance alone."""
    for name, size in (("bert", 0.02), ("bart", 128**-0.5)):
        model = Transformer(Config(preset=name).model(300))
        p, words = model.encoder.position.weight.detach().double(), model.embedding.weight.detach()
        assert abs(p.square().mean().sqrt() - size) < 1e-6 and abs(words.std() / size - 1) < 0.13  # BERT's are cut
        products = p @ p.T
        torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], atol=1e-6, rtol=0)
        drawn = Transformer(replace(model.config, init="normal"))
        assert abs(drawn.encoder.position.weight.std() - 0.02) < 2e-3


def test_bart_fills_in_tokens_that_stand_where_they_stood():
    known = Vocabulary(
        300, begins_word=torch.ones(300, dtype=bool), ends_sentence=torch.arange(300) % 7 == 0,
        ends_line=torch.zeros(300, dtype=bool),
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(known.specials, 300, 4000)
    name, options = recipe("bart")
    batch = OBJECTIVES[name](tokens, Config(preset="bart").model(300).context, known, **options).fixed(np.arange(64))
    inputs, text = batch["inputs"], batch["labels"]
    hidden = inputs == known.mask
    assert torch.equal(inputs[~hidden], text[~hidden]) and (hidden.sum(1) == 10).all()  # ⌈0.3 · 31⌉ of each row

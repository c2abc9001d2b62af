"""SpanBERT's objective: what stands beside each span, and the head that reads it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, SpanBoundary, Vocabulary

SIZE, CONTEXT = 400, 64
VOCABULARY = Vocabulary(SIZE, begins_word=torch.arange(SIZE) % 2 == 0)
STREAM = np.random.default_rng(0).integers(5, SIZE, 50_000).astype(np.uint16)
STREAM[::97] = VOCABULARY.eos


@pytest.fixture(scope="module")
def objective():
    return SpanBoundary(STREAM, CONTEXT, VOCABULARY, rate=0.3)


def make(objective):
    torch.manual_seed(0)
    sizes = dict(vocab_size=SIZE, dim=32, layers=2, heads=2, context=CONTEXT)
    return objective.model(preset("roberta", **sizes, **objective.shape)).eval()


def test_each_place_knows_the_tokens_beside_its_span(objective):
    """Found by walking from each place to either side, until a token is not hidden."""
    batch = objective.batch(0, 0, 50)
    spans = 0
    for row in range(50):
        hidden = {p.item() for p, y in zip(batch["places"][row], batch["labels"][row], strict=True) if y != IGNORED}
        assert 0 not in hidden and CONTEXT - 1 not in hidden and hidden
        for i, place in enumerate(batch["places"][row].tolist()):
            if place in hidden:
                before = next(p for p in range(place, -1, -1) if p not in hidden)
                after = next(p for p in range(place, CONTEXT) if p not in hidden)
                assert (batch["before"][row, i], batch["after"][row, i]) == (before, after)
                spans += after - before > 3
    assert spans > 100
    inputs = batch["inputs"]
    assert (inputs[:, 0] == VOCABULARY.begin).all() and (inputs[:, -1] == VOCABULARY.eos).all()


def test_the_boundary_loss_is_its_formula(objective):
    """Joshi et al. 2020, eq. 2 and sec. 3.2, a target at a time in fp64."""
    model, batch = make(objective).double(), objective.batch(0, 0, 3)
    states, total = model.model.states(batch["inputs"]), 0.0
    norm = lambda x, module: F.layer_norm(x, x.shape, module.weight, module.bias, 1e-5)
    for row in range(3):
        columns = (batch[name][row].tolist() for name in ("places", "labels", "before", "after"))
        for place, label, s, e in zip(*columns, strict=True):
            if label != IGNORED:
                h = torch.cat((states[row, s], states[row, e], model.places.weight[place - s - 1]))
                h = norm(F.gelu(model.inner.weight @ h + model.inner.bias), model.inner_norm)
                y = norm(F.gelu(model.outer.weight @ h + model.outer.bias), model.outer_norm)
                logits = model.model.embedding.weight @ y + model.model.head.bias
                total -= logits.log_softmax(0)[label]
    with fastlm.use_backend("reference"):  # the only one of fp64
        terms = objective.loss(model, batch)
    torch.testing.assert_close(terms["boundary"].double(), total, rtol=1e-5, atol=0)
    assert terms["mlm"].item() / objective.targets(batch)["mlm"] == pytest.approx(math.log(SIZE), rel=0.02)


def test_boundaries_alone_are_read(objective):
    """The head of boundaries does not see the states inside its span."""
    model, batch = make(objective), objective.batch(0, 0, 4)
    states = model.states(batch["inputs"]).detach()
    hidden = torch.zeros(4, CONTEXT, dtype=torch.bool).scatter(1, batch["places"], batch["labels"] != IGNORED)
    model.states = lambda inputs: states
    real = objective.loss(model, batch)
    model.states = lambda inputs: states.masked_fill(hidden[..., None], 7.0)
    other = objective.loss(model, batch)
    assert real["boundary"] == other["boundary"] and real["mlm"] != other["mlm"]


def test_what_it_writes_is_the_model_alone(objective):
    model = make(objective)
    assert objective.exported(model) is model.model
    assert "→" in objective.sample(model, 20, torch.Generator().manual_seed(0), lambda ids: f"{ids[0]} ")


def test_rows_without_room_are_refused():
    for context, words in ((2, "rows of 2, fewer than <s>, a token and <eos>"), (3, "are not one target")):
        with pytest.raises(ValueError, match=words):
            SpanBoundary(STREAM, context, VOCABULARY)
    with pytest.raises(ValueError, match="lacks begins_word"):
        SpanBoundary(STREAM, 64, Vocabulary(SIZE))

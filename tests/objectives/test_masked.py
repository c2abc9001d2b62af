"""Masked language modelling: how many places, what becomes of them, and that noise depends on its name alone."""

import math

import numpy as np
import pytest
import torch

from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, Masked, Vocabulary

VOCABULARY = Vocabulary(500)
STREAM = np.random.default_rng(0).integers(5, 500, 200_000).astype(np.uint16)
STREAM[::37] = VOCABULARY.eos


def objective(context=128, **options):
    return Masked(STREAM, context, VOCABULARY, **options)


def test_shares_and_specials():
    """80/10/10 within 1 % of 10⁵ targets; specials are neither targets nor drawn; the count is exact."""
    o = objective()
    batch = o.batch(0, 0, 5300)
    rows = o.rows.drawn(0, 0, 5300)[0]
    labels, at = batch["labels"], batch["inputs"].gather(1, batch["places"])
    assert labels.shape == (5300, 19) and o.targets(batch) == {"loss": labels.numel()} and labels.numel() > 1e5
    assert (labels >= VOCABULARY.specials).all() and torch.equal(rows.gather(1, batch["places"]), labels)
    share = lambda x: x.float().mean().item()
    kept = share(at == labels)
    assert abs(share(at == VOCABULARY.mask) - 0.8) < 0.01
    assert abs(kept - 0.1 - 0.1 / 495) < 0.01
    drawn = at[(at != VOCABULARY.mask) & (at != labels)]
    assert drawn.min() >= VOCABULARY.specials and drawn.unique().numel() == 495
    untouched = torch.ones_like(rows, dtype=torch.bool).scatter(1, batch["places"], False)
    assert torch.equal(batch["inputs"][untouched], rows[untouched])
    assert all(len(set(places)) == 19 for places in batch["places"][:50].tolist())


def test_rounds_repeat_the_noise():
    """Static masking hides the same places of sample i in every epoch, wherever its window stands."""
    o = objective(rounds=1)
    places = o.batch(0, 0, 3 * len(o))["places"]
    epochs, indices = zip(*(divmod(s, len(o)) for s in range(3 * len(o))), strict=True)
    text = o.rows.drawn(0, 0, 3 * len(o))[0] >= VOCABULARY.specials
    draws = {}
    for row, words, index in zip(places.tolist(), text.all(1).tolist(), indices, strict=True):
        if words:  # a special token in the window moves a place
            assert draws.setdefault(index, row) == row
    assert len(set(epochs)) == 3


def test_rows_of_specials_have_fewer_targets():
    stream = np.full(1000, VOCABULARY.eos, np.uint16)
    stream[::20] = 7
    o = Masked(stream, 40, VOCABULARY)
    batch = o.batch(0, 0, 8)
    assert ((batch["labels"] == 7).sum(1) <= 2).all() and set(batch["labels"].unique().tolist()) == {7, IGNORED}
    assert o.targets(batch)["loss"] == (batch["labels"] == 7).sum()


def test_the_head_reads_the_places_and_the_first_loss_is_ln_v():
    torch.manual_seed(0)
    model = Transformer(preset("bert", vocab_size=500, dim=64, layers=1, heads=2, pair_labels=0)).eval()
    o, seen = objective(), []
    model.head.transform.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    batch = o.batch(0, 0, 8)
    loss = o.loss(model, batch)["loss"].item() / o.targets(batch)["loss"]
    assert seen == [(8, 19, 64)] and abs(loss / math.log(500) - 1) < 0.02


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="5 tokens, fewer than one row of 128"):
        Masked(STREAM[:5], 128, VOCABULARY)
    with pytest.raises(ValueError, match=r"rows of 3, of which 0.15 are not one target"):
        Masked(STREAM, 3, VOCABULARY)

"""Masked language modelling under several masks: how often each is drawn, and who sees whom."""

import numpy as np
import torch

from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import Masked, MultitaskMasked, Vocabulary

SIZE, L = 300, 12
VOCABULARY = Vocabulary(SIZE)
STREAM = np.random.default_rng(0).integers(5, SIZE, 40_000).astype(np.uint16)
ROW = torch.arange(L)
SEES = {  # [query, key]
    "both": torch.ones(L, L, dtype=torch.bool),
    "left": ROW[:, None] >= ROW,
    "right": ROW[:, None] <= ROW,
    "prefix": (ROW[:, None] >= ROW) | (ROW < L // 2),
}


def by_mask(batch):
    """The name of each row's mask, by its ranks."""
    sees = batch["ranks"][:, None, :] <= batch["ranks"][:, :, None]
    return [next(name for name, expected in SEES.items() if torch.equal(row, expected)) for row in sees]


def test_masks_are_drawn_in_their_proportions():
    drawn = by_mask(MultitaskMasked(STREAM, L, VOCABULARY).batch(0, 0, 3000))
    for name, expected in {"both": 1 / 3, "left": 1 / 6, "right": 1 / 6, "prefix": 1 / 3}.items():
        assert abs(drawn.count(name) / 3000 - expected) < 0.03, name
    alone = MultitaskMasked(STREAM, L, VOCABULARY, both=0.0, left=0.0, prefix=0.0)
    assert set(by_mask(alone.batch(0, 0, 200))) == {"right"}


def test_tokens_are_hidden_as_in_masked_language_modelling():
    one, other = MultitaskMasked(STREAM, L, VOCABULARY, rate=0.3), Masked(STREAM, L, VOCABULARY, rate=0.3)
    batch, plain = one.batch(0, 0, 50), other.batch(0, 0, 50)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)


def test_a_token_is_predicted_from_what_it_sees():
    o = MultitaskMasked(STREAM, L, VOCABULARY, rate=0.9)
    torch.manual_seed(0)
    net = Transformer(preset("deberta", vocab_size=SIZE, dim=32, layers=1, heads=2, context=L, **o.shape)).eval()
    batch = o.batch(0, 0, 40)
    before = o.logits(net, batch)
    for place in range(L):
        inputs = batch["inputs"].clone()
        inputs[:, place] = 5 + (inputs[:, place] + 1) % (SIZE - 5)
        moved = (o.logits(net, batch | {"inputs": inputs}) != before).any(-1)
        for row, name in enumerate(by_mask(batch)):
            assert torch.equal(moved[row], SEES[name][batch["places"][row], place]), (place, name)

"""Prefix language modelling: how long prefixes are, which tokens are targets, and who sees whom."""

import numpy as np
import torch

from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, Causal, Prefix, Vocabulary

VOCABULARY = Vocabulary(500)
STREAM = np.random.default_rng(0).integers(5, 500, 40_000).astype(np.uint16)


def model(context):
    torch.manual_seed(0)
    return Transformer(preset("llama", vocab_size=500, dim=32, layers=2, heads=2, context=context)).eval()


def test_targets_are_the_tokens_after_the_prefix():
    o, plain = Prefix(STREAM, 16, VOCABULARY), Causal(STREAM, 16, VOCABULARY)
    batch, whole = o.batch(0, 0, 2400), plain.batch(0, 0, 2400)
    assert torch.equal(batch["inputs"], whole["inputs"])
    target = torch.arange(1, 17) >= batch["prefix"][:, None]
    assert torch.equal(batch["labels"], whole["labels"].masked_fill(~target, IGNORED))
    assert o.targets(batch) == {"loss": (17 - batch["prefix"]).sum().item()}
    counts = torch.bincount(batch["prefix"])
    assert len(counts) == 17 and counts[0] == 0 and (counts[1:] / 2400 - 1 / 16).abs().max() < 0.02


def test_the_prefix_sees_itself_and_nothing_sees_what_comes_after_it():
    o, net = Prefix(STREAM, 16, VOCABULARY), model(16)
    batch = o.batch(0, 0, 1) | {"prefix": torch.tensor([6])}
    before = net(batch["inputs"], prefix=batch["prefix"])[0]
    for place in range(16):
        other = batch["inputs"].clone()
        other[0, place] = 5 + (other[0, place] + 1) % 400
        moved = (net(other, prefix=batch["prefix"])[0] != before).any(-1)
        sees = torch.arange(16) >= (0 if place < 6 else place)
        assert torch.equal(moved, sees), place

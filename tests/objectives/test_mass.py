"""MASS: where the fragment lies, what the encoder and the decoder see of it."""

import numpy as np
import pytest
import torch

from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import MASS, Vocabulary

VOCABULARY = Vocabulary(500)
STREAM = np.random.default_rng(0).integers(5, 500, 60_000).astype(np.uint16)


def test_the_encoder_sees_the_rest_and_the_decoder_the_fragment():
    o = MASS(STREAM, 33, VOCABULARY)
    batch, rows = o.batch(0, 0, 400), o.rows.drawn(0, 0, 400)[0]
    positions, labels = batch["positions"], batch["labels"]
    assert labels.shape == (400, 16) and (positions.diff() == 1).all() and o.targets(batch) == {"loss": 400 * 16}
    assert torch.equal(rows.gather(1, positions), labels)
    before = torch.cat((torch.full((400, 1), VOCABULARY.pad), rows), 1).gather(1, positions)
    assert torch.equal(batch["decoder_inputs"], before)
    hidden = torch.zeros_like(rows, dtype=torch.bool).scatter(1, positions, True)
    assert torch.equal(batch["inputs"][~hidden], rows[~hidden])
    begins = torch.bincount(positions[:, 0], minlength=18)
    assert (begins > 0).all() and len(begins) == 18


def test_shares():
    o = MASS(STREAM, 64, VOCABULARY, ends=0.2)
    batch = o.batch(0, 0, 3000)
    at = batch["inputs"].gather(1, batch["positions"])
    share = lambda x: x.float().mean().item()
    assert abs(share(at == VOCABULARY.mask) - 0.8) < 0.01 and abs(share(at == batch["labels"]) - 0.1) < 0.01
    begin, even = batch["positions"][:, 0], 0.6 / 33
    assert abs(share(begin == 0) - 0.2 - even) < 0.025 and abs(share(begin == 32) - 0.2 - even) < 0.025


def test_a_token_and_a_whole_row_are_the_extremes():
    one, whole = MASS(STREAM, 32, VOCABULARY, share=1 / 32), MASS(STREAM, 32, VOCABULARY, share=1.0)
    assert one.batch(0, 0, 4)["labels"].shape == (4, 1)
    batch = whole.batch(0, 0, 4)
    assert torch.equal(batch["labels"], whole.rows.drawn(0, 0, 4)[0]) and (batch["decoder_inputs"][:, 0] == 0).all()
    with pytest.raises(ValueError, match=r"rows of 1, of which 0\.5 are no fragment"):
        MASS(STREAM, 1, VOCABULARY)


def test_a_fragment_is_predicted_at_its_own_positions():
    """The same fragment elsewhere in the row is another question for learned positions."""
    torch.manual_seed(0)
    o = MASS(STREAM, 32, VOCABULARY)
    model = Transformer(preset("mass", vocab_size=500, dim=32, layers=1, heads=2, context=32)).eval()
    batch = o.batch(0, 0, 2)
    moved = batch | {"positions": (batch["positions"] + 1) % 32}
    assert not torch.allclose(o.logits(model, batch), o.logits(model, moved))

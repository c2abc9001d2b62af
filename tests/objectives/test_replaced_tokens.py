"""Replaced-token detection: what the discriminator is given, what it is told, and what each term counts."""

import math

import numpy as np
import pytest
import torch

from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, ReplacedTokens, Vocabulary, noise

VOCABULARY = Vocabulary(100)
STREAM = np.random.default_rng(0).integers(5, 100, 20_000).astype(np.uint16)
STREAM[::37] = VOCABULARY.eos


def pair(**options):
    torch.manual_seed(0)
    o = ReplacedTokens(STREAM, 64, VOCABULARY, **options)
    return o, o.model(preset("electra", vocab_size=100, dim=32, layers=1, heads=2, context=64, **o.shape)).eval()


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"disallow_equal": True}, {"temperature": 3.0}])
def test_the_discriminator_is_given_the_text_with_tokens_put_in(options):
    o, model = pair(**options)
    batch = o.batch(0, 0, 200)
    _, seen, _ = o._answers(model, batch)
    text = batch["tokens"]
    assert torch.equal(text, o.rows.drawn(0, 0, 200)[0])
    places = torch.zeros_like(text, dtype=torch.bool).scatter(1, batch["places"], batch["labels"] != IGNORED)
    assert torch.equal(seen[~places], text[~places])
    assert (seen[places] >= VOCABULARY.specials).all()  # <mask> among the others
    equal = (seen == text)[places].float().mean()
    assert equal == 0 if "disallow_equal" in options else 0.002 < equal < 0.03


def test_labels_are_zero_where_the_draw_is_the_token_that_was_there():
    o, model = pair()
    batch = o.batch(0, 0, 4)
    model.discriminator.head.out.weight.data.zero_()
    model.discriminator.head.out.bias.data.fill_(2.0)  # says "replaced" of every token, with one logit
    (terms, shares), (_, seen, _) = o.evaluate(model, batch), o._answers(model, batch)
    wrong = (seen == batch["tokens"]).sum().item()
    right = seen.numel() - wrong
    expected = right * math.log1p(math.exp(-2)) + wrong * math.log1p(math.exp(2))
    assert terms["detection"].item() == pytest.approx(expected, rel=1e-5)
    assert [x.item() for x in shares["precision"]] == [right, seen.numel()]
    assert [x.item() for x in shares["recall"]] == [right, right]


def test_places_and_counts():
    """85 % become <mask> and nothing another token; each term has its own count."""
    o, _ = pair()
    batch = o.batch(0, 0, 300)
    at = batch["inputs"].gather(1, batch["places"])
    masked, kept = at == VOCABULARY.mask, at == batch["labels"]
    assert abs(masked.float().mean() - 0.85) < 0.015 and (masked | kept).all()
    assert o.targets(batch) == {"mlm": 300 * 10, "detection": 300 * 64} and o.weights == {"detection": 50.0}


def test_no_gradient_passes_the_draw():
    o, model = pair(sharing="none")
    o.loss(model, o.batch(0, 0, 4))["detection"].backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert all(p.grad is not None for p in model.discriminator.parameters())


def test_choices_are_distributed_as_the_softmax():
    logits = torch.tensor([-torch.inf, 1.0, 0.0, -torch.inf, 2.0, -1.0, -torch.inf])
    words = torch.cat((noise.draw(0, noise.Purpose.GENERATOR, 0, 0, 100_000), torch.tensor([0, 2**32 - 1])))
    chosen = noise.choose(logits.expand(len(words), -1), words)
    shares = torch.bincount(chosen, minlength=7) / len(words)
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=0.005)
    assert (shares[logits == -torch.inf] == 0).all()

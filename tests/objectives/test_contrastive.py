"""Contrastive learning of sequences: views, similarities against the formula, and the same on several ranks."""

import math

import numpy as np
import pytest
import torch

from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, Contrastive, Masked, Vocabulary
from fastlm.objectives.contrastive import similarities

SIZE, L = 300, 21
VOCABULARY = Vocabulary(SIZE)
STREAM = np.random.default_rng(0).integers(5, SIZE, 40_000).astype(np.uint16)


def test_views_are_of_one_text():
    o = Contrastive(STREAM, L, VOCABULARY, rate=0.2)
    batch = o.batch(0, 0, 400)
    hidden = batch["labels"] != IGNORED
    text = batch["inputs"].scatter(
        1, batch["places"], batch["labels"].where(hidden, batch["inputs"].gather(1, batch["places"]))
    )
    assert (text[:, 0] == VOCABULARY.begin).all() and (batch["crops"][:, 0] == VOCABULARY.begin).all()
    crops, begins = batch["crops"][:, 1:], []
    for row, crop in zip(text[:, 1:], crops, strict=True):
        begins += [begin for begin in range(3) if torch.equal(row[begin : begin + 18], crop)][:1]
    assert crops.shape[1] == 18 and len(begins) == 400
    assert all(abs(begins.count(n) / 400 - 1 / 3) < 0.08 for n in range(3))
    assert hidden.sum(1).float().mean() == Masked(STREAM, L, VOCABULARY, rate=0.2).masking.count(L)


def test_similarities_are_the_papers():
    torch.manual_seed(0)
    views = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    logits, partners = similarities(views, 0.5)
    assert partners.tolist() == [3, 4, 5, 0, 1, 2]
    got = torch.nn.functional.cross_entropy(logits, partners, reduction="sum")
    unit = views / views.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(6):
        likeness = [math.exp((unit[i] @ unit[j]).item() / 0.5) if j != i else 0.0 for j in range(6)]
        expected -= math.log(likeness[(i + 3) % 6] / sum(likeness))
    assert abs(got.item() - expected) < 1e-5
    (grad,) = torch.autograd.grad(got, views)
    assert grad.isfinite().all() and (grad * views).sum(1).abs().max() < 1e-5  # lengths do not matter


def made():
    o = Contrastive(STREAM, L, VOCABULARY)
    torch.manual_seed(0)
    return o, Transformer(preset("roberta", vocab_size=SIZE, dim=16, layers=1, heads=2, context=L, **o.shape)).eval()


def sums(batch):
    """Terms and gradients of a batch."""
    o, net = made()
    terms = o.loss(net, batch)
    sum(terms.values()).backward()
    return [*(value.detach() for value in terms.values()), *(p.grad for p in net.parameters())]


def agree(rank, world, batch, expected):
    mine = slice(rank * 7 // world, (rank + 1) * 7 // world)  # the last rank has one row more
    for got, whole in zip(sums({name: x[mine] for name, x in batch.items()}), expected, strict=True):
        torch.distributed.all_reduce(got)
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_ranks_compare_all_rows_of_the_batch(ranks):
    batch = made()[0].batch(0, 0, 7)
    ranks.run(agree, batch, sums(batch))

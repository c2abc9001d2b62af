"""Embedding in the place of torch's, and the function below it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.nn import Embedding

IDS = torch.tensor([[3, 0, 3], [5, 3, 9]])


@pytest.mark.parametrize("options", [{}, dict(padding_idx=3), dict(padding_idx=-1)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_it_is_torchs(backend, options):
    torch.manual_seed(0)
    other = nn.Embedding(10, 6, **options)
    torch.manual_seed(0)
    ours = Embedding(10, 6, **options)
    assert torch.equal(ours.weight, other.weight)
    ours.load_state_dict(other.state_dict())
    assert repr(ours) == repr(other) and isinstance(ours, nn.Embedding)
    with fastlm.use_backend(embedding=backend):
        for made in (ours, other):
            made(IDS).square().sum().backward()
        torch.testing.assert_close(ours(IDS.int()), other(IDS))
    torch.testing.assert_close(ours.weight.grad, other.weight.grad)


def test_from_pretrained():
    weight = torch.randn(10, 6)
    made = Embedding.from_pretrained(weight, padding_idx=2)
    assert type(made) is Embedding and not made.weight.requires_grad and torch.equal(made(IDS), weight[IDS])


@pytest.mark.parametrize("options, words", [
    (dict(max_norm=1.0), "max_norm is 1.0, which fastlm.nn.Embedding has not; use torch.nn.Embedding"),
    (dict(scale_grad_by_freq=True), "scale_grad_by_freq is True"),
    (dict(sparse=True), "sparse is True"),
])  # fmt: skip
def test_options_that_it_has_not_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Embedding(10, 6, **options)


@pytest.mark.parametrize("ids, weight, options, error, words", [
    (IDS.float(), torch.zeros(10, 6), {}, ValueError, "ids are torch.float32; give int64 or int32"),
    (IDS, torch.zeros(10), {}, ValueError, r"weight is torch.float32 \[10\]; give floats \[V, D\]"),
    (IDS, torch.zeros(10, 6, dtype=torch.int64), {}, ValueError, "weight is torch.int64"),
    (IDS, torch.zeros(10, 6), dict(padding_idx=10), ValueError, "padding_idx is 10; give a token of 10, or None"),
    ([1], torch.zeros(10, 6), {}, ValueError, "ids is of type list"),
    (IDS, torch.zeros(9, 6), {}, IndexError, "ids hold 9; give 0 to 8"),
    (-IDS, torch.zeros(10, 6), {}, IndexError, "ids hold -3; give 0 to 9"),
])  # fmt: skip
def test_what_does_not_fit_is_named(ids, weight, options, error, words):
    with pytest.raises(error, match=words):
        fastlm.embedding(ids, weight, **options)


def test_every_size_is_there():
    for shape in ((), (0,), (2, 0), (4, 5)):
        ids, weight = torch.zeros(shape, dtype=torch.int64), torch.randn(3, 2, requires_grad=True)
        for backend in ("cpp", "torch"):
            with fastlm.use_backend(embedding=backend):
                y = fastlm.embedding(ids, weight)
                (grad,) = torch.autograd.grad(y.sum(), weight)
            assert torch.equal(y, F.embedding(ids, weight)) and grad[0, 0] == ids.numel() and not grad[1:].any()

"""Embeddings of torch's that ours gains on: swapped in place, the same rows, gradients nearer to the truth."""

import copy

import pytest
import torch
from torch import nn

import fastlm
from fastlm.backends.dispatch import record_choices
from fastlm.interop.swap.embeddings import Words
from fastlm.ops.embedding import gains

IDS = torch.tensor([[3, 0, 3, 2], [3, 3, 1, 3]])


def both_ways(module: nn.Embedding) -> list[torch.Tensor]:
    y = module(IDS)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y.detach(), *torch.autograd.grad(y, module.weight, dy)]


def test_it_is_exchanged_and_brought_back():
    module = nn.Embedding(5, 8, padding_idx=1, dtype=torch.bfloat16)
    want, wide = both_ways(module), copy.deepcopy(module).double()
    truth = both_ways(wide)
    assert fastlm.swap(module).swapped == [("", Words.how)] == fastlm.swap(module).swapped  # twice is once
    assert isinstance(module, nn.Embedding) and repr(module) == "Embedding(5, 8, padding_idx=1)"
    with record_choices() as chosen:
        got = both_ways(copy.deepcopy(module))
    assert "embedding" in chosen and torch.equal(got[0], want[0])
    assert (got[1] - truth[1]).abs().max() <= (want[1] - truth[1]).abs().max() and not got[1][1].any()
    fastlm.unswap(module)
    assert type(module) is nn.Embedding and all(map(torch.equal, both_ways(module), want))


def test_which_ones_gain():
    assert gains(nn.Embedding(2**17, 64).weight) and gains(nn.Embedding(3, 4, dtype=torch.float16).weight)
    few, scaled = nn.Embedding(100, 64), type("Scaled", (nn.Embedding,), {})(2**17, 64)
    for module in (few, scaled, nn.EmbeddingBag(3, 4, dtype=torch.float16)):
        assert fastlm.swap(module) == fastlm.interop.swap.Report()
    large = nn.ModuleDict({"words": nn.Embedding(2**17, 64)})
    assert fastlm.swap(large, embeddings=False).swapped == []
    assert fastlm.swap(large).swapped == [("words", Words.how)]


@pytest.mark.parametrize("options, words", [
    (dict(max_norm=1.0), "its max_norm is 1.0, which fastlm.embedding has not"),
    (dict(sparse=True), "its sparse is True"),
])  # fmt: skip
def test_what_is_kept(options, words):
    ((name, why),) = fastlm.swap(nn.Embedding(5, 8, dtype=torch.bfloat16, **options)).kept
    assert name == "" and words in why


def test_a_model_with_tied_words():
    """One that reads and guesses with one table: the same loss, and a gradient of the same dtype."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(2**17, 64)})
    loss = lambda: (model["words"](IDS).tanh() @ model["words"].weight[:5].T).logsumexp(-1).sum()
    want = [loss(), *torch.autograd.grad(loss(), model["words"].weight)]
    fastlm.swap(model)
    torch.testing.assert_close([loss(), *torch.autograd.grad(loss(), model["words"].weight)], want)

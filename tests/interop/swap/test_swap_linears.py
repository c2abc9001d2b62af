"""Linear layers swapped: the same tokens, fewer seconds; and not unless they are asked for."""

import copy

import pytest
import torch
import transformers

import fastlm
from fastlm.interop.swap.linears import FewRows
from fastlm.interop.swap.losses import Head
from fastlm.interop.swap.served import WRAPPED

LLAMA = transformers.LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
ALONE = dict(attention=False, norms=False, rotary=False, embeddings=False, loss=False, linears=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(LLAMA).eval()


def written(model):
    return model.generate(torch.arange(8)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)


def test_a_model_writes_the_same(model, monkeypatch):
    expected, rows = written(model), []
    ours = fastlm.interop.swap.linears.linear
    monkeypatch.setattr("fastlm.interop.swap.linears.linear", lambda x, *of: rows.append(x.shape[1]) or ours(x, *of))
    report = fastlm.swap(copy.deepcopy(model), **ALONE)
    assert len(report.swapped) == 2 * 7 + 1 and report.kept == []
    swapped = copy.deepcopy(model)
    fastlm.swap(swapped, **ALONE)
    assert torch.equal(written(copy.deepcopy(swapped)), expected)
    assert rows.count(1) == 7 * 15 + 1  # each of the tokens after the first; the head sees one row of the prompt too
    fastlm.unswap(swapped)
    assert not any(isinstance(module, FewRows) for module in swapped.modules())
    assert torch.equal(written(swapped), expected)


def test_with_all_else_and_gradients(model):
    labels = torch.arange(16).view(2, 8)
    expected = torch.autograd.grad(model(labels, labels=labels).loss, list(model.parameters()))
    report = fastlm.swap(model, linears=True)
    assert type(model.lm_head).served is Head and ("model.layers.0.mlp.up_proj", FewRows.how) in report.swapped
    got = torch.autograd.grad(model(labels, labels=labels).loss, list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert fastlm.swap(model, linears=True).swapped == report.swapped  # twice is once


def test_only_where_asked_for_and_whole(model):
    fastlm.swap(model)
    assert not any(isinstance(module, FewRows) for module in model.modules())
    subclass, wrapped = type("Mine", (torch.nn.Linear,), {})(2, 2), torch.nn.Linear(2, 2)
    wrapped.forward = lambda x: x
    assert fastlm.swap(subclass, **ALONE).swapped == []
    assert fastlm.swap(wrapped, **ALONE).kept == [("", WRAPPED)]
    with pytest.raises(ValueError, match="linears"):
        fastlm.swap(model, linears="yes")

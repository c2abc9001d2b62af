"""Rotary embedding by any function: known by what it computes, and then the same numbers and gradients."""

import copy
import importlib
import pickle

import pytest
import torch
from families import BEFORE_5, make, padded, tokens
from tolerance import max_and_rms
from torch import nn

import fastlm
from fastlm.backends.dispatch import record_choices
from fastlm.interop.swap.rotary import REPEATS, Kind, Rotating, _ours, kind_of

KINDS = {
    "llama": Kind("half", "halves", partial=False, casts=False),
    "gpt_neox": Kind("half", "halves", partial=True, casts=False),
    "olmo2": Kind("half", "halves", partial=False, casts=True),
    "gpt_oss": Kind("half", "once", partial=False, casts=False),
    "cohere": Kind("interleaved", "pairs", partial=False, casts=True),
    "glm": Kind("interleaved", "halves", partial=True, casts=False),
}
ALONE = dict(attention=False, norms=False, loss=False)
pytestmark = pytest.mark.skipif(BEFORE_5, reason="swapped from transformers 5 on")


def function(name: str):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}").apply_rotary_pos_emb


@pytest.mark.parametrize("name", KINDS)
def test_known_by_what_it_computes(name):
    assert kind_of(function(name)) == KINDS[name]


def test_what_turns_otherwise_is_not_known():
    assert kind_of(function("nanochat")) is None  # the other way round
    assert kind_of(function("gptj")) is None  # takes sin before cos
    assert kind_of(lambda q, k, cos, sin, unsqueeze_dim: (q, k)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_numbers_and_gradients(name, dtype):
    """As near to fp64 as theirs, to a factor of two, from either order of heads and rows."""
    theirs, kind = function(name), KINDS[name]
    draw = torch.Generator().manual_seed(0)
    angles = torch.rand(2, 9, 8, generator=draw).mul(6).to(dtype)
    cos, sin = (REPEATS[kind.repeats](f(angles)) for f in (torch.cos, torch.sin))
    D = 24 if kind.partial else 16
    for dim in (1, 2):
        q, k = (torch.randn(2, heads, 9, D, generator=draw).transpose(1, dim).to(dtype) for heads in (4, 2))

        def both_ways(turn, q, k, *tables, dim=dim):
            q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
            turned = turn(q, k, *tables, dim)
            return [*turned, *torch.autograd.grad(turned, (q, k), [torch.ones_like(x).cumsum(-1) for x in turned])]

        truth = both_ways(theirs, *(x.double() for x in (q, k, cos, sin)))
        want = both_ways(theirs, q, k, cos, sin)
        with fastlm.use_backend(rotate="cpp"), record_choices() as chosen:
            got = both_ways(_ours(theirs, kind), q, k, cos, sin)
        assert chosen["rotate"] == "cpp"
        for ours, their, true in zip(got, want, truth, strict=True):
            assert ours.dtype == their.dtype and ours.shape == their.shape
            assert max_and_rms(ours, true)[1] <= 2 * max_and_rms(their, true)[1] + 1e-7


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "phi3", "cohere", "glm", "gpt_oss"])
def test_models(name):
    model = make("causal", name, "eager")
    other, forward = copy.deepcopy(model), type(model.base_model.layers[0]).forward
    want, state = both(model), copy.deepcopy(model.state_dict())
    report = fastlm.swap(model, **ALONE)
    assert report.kept == [] and {how for _, how in report.swapped} == {Rotating.how} and len(report.swapped) == 2
    assert fastlm.swap(model, **ALONE).swapped == report.swapped  # twice is once
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with record_choices() as chosen:
            torch.testing.assert_close(both(one), want, rtol=1e-3, atol=1e-4)
        assert "rotate" in chosen
    assert state.keys() == model.state_dict().keys()
    with record_choices() as chosen:
        torch.testing.assert_close(both(other), want, rtol=0, atol=0)
    assert "rotate" not in chosen  # nobody else's is swapped
    fastlm.unswap(model)
    assert type(model.base_model.layers[0]).forward is forward and not any(
        isinstance(m, Rotating) for m in model.modules()
    )
    torch.testing.assert_close(both(model), want, rtol=0, atol=0)


def both(model) -> list[torch.Tensor]:
    """Logits where tokens are no padding, and the gradient of a first layer's projection."""
    mask = padded("left")
    logits = model(tokens(), attention_mask=mask, use_cache=False).logits[mask.bool()]
    weight = next(m.weight for m in model.modules() if isinstance(m, nn.Linear))
    return [logits, *torch.autograd.grad(logits.square().mean(), weight)]


def test_together_with_the_rest_and_a_cache():
    model = make("causal", "llama", "eager")
    given = dict(attention_mask=padded("left"), max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    given |= dict(return_dict_in_generate=True, output_logits=True)
    want = model.generate(tokens(), **given).logits
    report = fastlm.swap(model)
    assert ("model.layers.0.self_attn", Rotating.how) in report.swapped and report.kept == []
    torch.testing.assert_close(model.generate(tokens(), **given).logits, want, rtol=1e-3, atol=1e-3)


def test_tables_that_do_not_repeat_are_told():
    model = make("causal", "llama", "eager")
    made = type(model.model.rotary_emb)

    class LlamaRotaryEmbedding(made):
        def forward(self, x, position_ids):
            return [table.cumsum(-1) for table in super().forward(x, position_ids)]

    LlamaRotaryEmbedding.__module__ = made.__module__
    model.model.rotary_emb.__class__ = LlamaRotaryEmbedding
    report = fastlm.swap(model, **ALONE)
    assert report.swapped == [] and report.kept[0][1].endswith("is given tables that do not repeat by halves")


def test_what_does_not_fit_is_left_to_theirs():
    """A table of another dtype decides about theirs."""
    theirs, draw = function("llama"), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 2, 9, 16, generator=draw).bfloat16()
    cos, sin = (REPEATS["halves"](f(torch.rand(2, 9, 8, generator=draw))) for f in (torch.cos, torch.sin))
    for got, want in zip(_ours(theirs, KINDS["llama"])(q, k, cos, sin), theirs(q, k, cos, sin), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)

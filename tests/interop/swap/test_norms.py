"""RMS norms of any class: known by what they compute, and then the same numbers and gradients."""

import copy
import pickle

import pytest
import torch
from families import make, padded, tokens, transformers
from tolerance import max_and_rms
from torch import nn

import fastlm
from fastlm.backends.dispatch import record_choices
from fastlm.interop.swap.norms import EPS, OffsetNorm, PlainNorm, RoundingNorm
from fastlm.ops.norm import default_eps

models = transformers.models
KINDS = {
    models.llama.modeling_llama.LlamaRMSNorm: RoundingNorm,
    models.qwen3.modeling_qwen3.Qwen3RMSNorm: RoundingNorm,
    models.t5.modeling_t5.T5LayerNorm: RoundingNorm,
    models.olmo2.modeling_olmo2.Olmo2RMSNorm: PlainNorm,
    models.gemma.modeling_gemma.GemmaRMSNorm: OffsetNorm,
    models.gemma2.modeling_gemma2.Gemma2RMSNorm: OffsetNorm,
    nn.RMSNorm: PlainNorm,
}


def drawn(cls: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = cls(64).to(dtype)
    with torch.no_grad():
        norm.weight.add_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    return norm


def both_ways(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    return [y, *torch.autograd.grad(y, (x, norm.weight), torch.ones_like(y).cumsum(-1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_numbers_and_gradients(cls, dtype):
    """As near to fp64 as theirs, to a factor of two; in bf16 the outputs are theirs to the bit but for a few."""
    norm = drawn(cls, dtype)
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = both_ways(norm, x)
    wide = nn.RMSNorm(64, eps=next(getattr(norm, name) or default_eps(dtype) for name in EPS if hasattr(norm, name)))
    wide.weight.data = norm.weight.detach().double() + KINDS[cls].weight_offset
    truth = both_ways(wide.double(), x.double())
    assert fastlm.swap(norm).swapped == [("", PlainNorm.how)] and type(norm).served is KINDS[cls]
    with fastlm.use_backend(rms_norm="cpp"), record_choices() as chosen:
        ours = both_ways(norm, x)
    assert chosen["rms_norm"] == "cpp"
    for got, their, true in zip(ours, theirs, truth, strict=True):
        assert got.dtype == their.dtype
        assert max_and_rms(got, true)[1] <= 2 * max_and_rms(their, true)[1]
    if dtype == torch.bfloat16:
        assert (ours[0] == theirs[0]).float().mean() > 0.99


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_a_weight_of_another_dtype(cls):
    norm, x = drawn(cls), torch.randn(5, 64).bfloat16()
    if cls is nn.RMSNorm:
        return  # PyTorch warns that it is slow, and its backward refuses
    want = both_ways(norm, x)
    fastlm.swap(norm)
    torch.testing.assert_close(both_ways(norm, x), want, rtol=0, atol=0)


def test_copies_pickles_state_dict_and_back():
    norm = drawn(models.llama.modeling_llama.LlamaRMSNorm)
    cls, x, seen = type(norm), torch.randn(3, 64), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    want, state = norm(x), copy.deepcopy(norm.state_dict())
    fastlm.swap(norm)
    assert seen == [1] and isinstance(norm, cls) and repr(norm) == f"{cls.__name__}((64,), eps=1e-06)"
    for one in (norm, copy.deepcopy(norm)):
        torch.testing.assert_close(one(x), want)
    assert len(seen) == 3
    norm._forward_hooks.clear()
    torch.testing.assert_close(pickle.loads(pickle.dumps(norm))(x), want)
    fastlm.unswap(norm)
    assert type(norm) is cls and torch.equal(norm(x), want)
    assert norm.state_dict().keys() == state.keys() and torch.equal(norm.weight, state["weight"])


class Clipped(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


class GatedRMSNorm(nn.RMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class WithBiasRMSNorm(nn.RMSNorm):
    def __init__(self, n):
        super().__init__(n)
        self.shift = nn.Parameter(torch.zeros(n))


class ClippedRMSNorm(Clipped):
    pass


@pytest.mark.parametrize("cls", [ClippedRMSNorm, GatedRMSNorm, WithBiasRMSNorm], ids=lambda cls: cls.__name__)
def test_what_computes_something_else_is_kept(cls):
    report = fastlm.swap(nn.Sequential(cls(64)))
    assert report.swapped == [] and report.kept[0][0] == "0" and "something else than an RMS norm" in report.kept[0][1]


def test_layer_norms_stay():
    """PyTorch's, and those that are another formula, such as Cohere's."""
    layers = nn.LayerNorm(8), nn.LayerNorm(8, bias=False), models.cohere.modeling_cohere.CohereLayerNorm(8)
    assert fastlm.swap(nn.Sequential(*layers)) == fastlm.interop.swap.Report()


def test_they_can_be_left():
    assert fastlm.swap(drawn(nn.RMSNorm), norms=False) == fastlm.interop.swap.Report()


def test_each_is_told_again():
    norm = drawn(nn.RMSNorm)
    assert fastlm.swap(norm) == fastlm.swap(norm)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "olmo2"])
def test_models(name):
    model, given = make("causal", name, "eager"), dict(input_ids=tokens(), attention_mask=padded("right"))
    want = model(**given).logits
    report = fastlm.swap(model, attention=False, loss=False)
    assert report.kept == [] and len(report.swapped) >= 5
    torch.testing.assert_close(model(**given).logits, want, rtol=1e-5, atol=1e-5)

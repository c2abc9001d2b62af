"""LayerNorm and RMSNorm in the place of torch's and transformers'."""

import pytest
import torch
from torch import nn

import fastlm
from fastlm.nn import LayerNorm, RMSNorm

OURS = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def norm_backend(request):
    with fastlm.use_backend(layer_norm=request.param, rms_norm=request.param):
        yield


@pytest.mark.parametrize("shape", [8, (8,), (4, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, dict(eps=1e-3), dict(elementwise_affine=False), dict(bias=False)], ids=str)
@pytest.mark.parametrize("theirs", OURS)
def test_it_is_torchs(theirs, options, shape):
    if theirs is nn.RMSNorm and "bias" in options:
        pytest.skip("torch's RMSNorm has no bias")
    other, ours = theirs(shape, **options), OURS[theirs](shape, **options)
    for i, p in enumerate(other.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    ours.load_state_dict(other.state_dict())
    assert repr(ours) == repr(other) and isinstance(ours, theirs)
    x, residual = (draw(3, 4, 8, seed=i).requires_grad_() for i in range(2))
    got, expected = [], []
    for made, norm in ((got, ours), (expected, other)):
        y = norm(x)
        made += [y, *torch.autograd.grad(y.square().sum(), (x, *norm.parameters()))]
    y, s = ours(x, residual)
    got += [y, s, *torch.autograd.grad((y * s).sum(), (x, residual, *ours.parameters()))]
    s = x + residual
    expected += [other(s), s, *torch.autograd.grad((other(s) * s).sum(), (x, residual, *other.parameters()))]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_eps_that_is_not_given_is_torchs(dtype):
    """It is fp32's for 16 bits, which small rows show."""
    x = 1e-3 * draw(5, 64).to(dtype)
    torch.testing.assert_close(RMSNorm(64, dtype=dtype)(x), nn.RMSNorm(64, dtype=dtype)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_transformers(dtype):
    """To the bit where PyTorch's mean and ours are: in 16 bits nearly all elements."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="pip install '.[test]'")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for theirs, options in (
        (llama.LlamaRMSNorm, dict(rounds_first=True)),
        (T5LayerNorm, dict(rounds_first=True)),
        (GemmaRMSNorm, dict(weight_offset=1.0)),
    ):
        other, ours = theirs(64, eps=1e-6).to(dtype), RMSNorm(64, 1e-6, dtype=dtype, **options)
        assert torch.equal(ours.weight, other.weight)
        with torch.no_grad():
            other.weight.add_(draw(64))
        ours.load_state_dict(other.state_dict())
        x = draw(50, 64).to(dtype)
        with fastlm.use_backend("cpp"):
            got, expected = ours(x), other(x)
        torch.testing.assert_close(got, expected)
        assert dtype == torch.float32 or (got == expected).float().mean() > 0.99


def test_a_residual_is_added_in_the_wider_dtype():
    x, residual = draw(3, 8).bfloat16(), draw(3, 8, seed=1)
    with fastlm.use_backend("cpp"):
        y, s = RMSNorm(8)(x, residual)
    assert torch.equal(s, x + residual) and y.dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LayerNorm(8)(torch.ones(3, 7)), r"x is \[3, 7\]; its last dimensions must be \[8\]"),
        (lambda: LayerNorm((2, 8))(torch.ones(8)), r"x is \[8\]; its last dimensions must be \[2, 8\]"),
        (lambda: RMSNorm(8)(torch.ones(3, 8), torch.ones(8)), r"residual is \[8\] and x \[3, 8\]; give them one shape"),
        (lambda: RMSNorm(8, weight_offset="1"), "weight_offset is '1'; give a number, such as 1.0"),
        (lambda: RMSNorm(8, rounds_first=1), "rounds_first is 1; give True or False"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

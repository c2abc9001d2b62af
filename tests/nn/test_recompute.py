"""What is computed again for a gradient: not there in between, the same bits, and kept where others say what is."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fastlm.nn import MLP
from fastlm.nn.recompute import recomputed

FORMS = [dict(activation="gelu"), dict(activation="gelu_tanh"), dict(activation="silu", gated=True)]


def gradients(layer, x, through=lambda layer, x: layer(x)):
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    return torch.autograd.grad(through(layer, leaves[0]).square().sum(), leaves)


def layer_and_input(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return MLP(24, 40, **options).to(dtype), torch.randn(2, 5, 24, dtype=dtype)


def test_it_is_not_kept():
    calls, x, weight = [], torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def make():
        calls.append(torch.is_grad_enabled())
        return x.sin()

    y = make()
    memory = StorageWeakRef(y.untyped_storage())
    with recomputed(y, make):
        z = F.linear(y, weight)
    del y
    assert memory.expired() and calls == [True]
    (grad,) = torch.autograd.grad(z.sum(), weight)
    assert calls == [True, False]
    torch.testing.assert_close(grad, x.detach().sin().sum(0).expand(4, 8))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_same_bits_as_kept(options, monkeypatch):
    layer, x = layer_and_input(**options)
    made = gradients(layer, x)
    monkeypatch.setattr("fastlm.nn.recompute._others_decide", lambda y: True)
    assert all(map(torch.equal, made, gradients(layer, x)))


def test_a_view_of_it():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    y = x.sin()
    with recomputed(y, lambda: x.sin()):
        z = y[1, :, ::2].reshape(3, 4) @ weight[:4] + (y.flatten(0, 1).t() @ y.flatten(0, 1)).sum()
    plain = x.sin()
    expected = plain[1, :, ::2].reshape(3, 4) @ weight[:4] + (plain.flatten(0, 1).t() @ plain.flatten(0, 1)).sum()
    for made, wanted in zip(*(torch.autograd.grad(of.sum(), (x, weight)) for of in (z, expected)), strict=True):
        assert torch.equal(made, wanted)


def test_second_derivatives():
    layer, x = layer_and_input(torch.float64)
    assert torch.autograd.gradgradcheck(layer, x.requires_grad_())


def test_a_weight_that_was_changed_is_noticed():
    layer, x = layer_and_input()
    y = layer(x)
    with torch.no_grad():
        layer.out.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"\[40, 24\] .* was changed in place .* is at version"):
        y.sum().backward()


def with_hooks_off(layer, x):
    with disable_saved_tensors_hooks("no hooks"):
        return layer(x)


def with_all_on_cpu(layer, x):
    with save_on_cpu():
        return layer(x)


@pytest.mark.parametrize("through", [
    with_hooks_off, with_all_on_cpu, lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True)(x),
], ids=["disabled", "save_on_cpu", "checkpoint", "compile"])  # fmt: skip
def test_where_others_decide_it_is_kept(through, monkeypatch):
    layer, x = layer_and_input(activation="relu")
    expected = gradients(layer, x)
    monkeypatch.setattr("fastlm.nn.recompute.saved_tensors_hooks", lambda *hooks: pytest.fail("not kept"))
    for made, wanted in zip(gradients(layer, x, through), expected, strict=True):
        torch.testing.assert_close(made, wanted)


def test_torch_func():
    layer, x = layer_and_input(activation="relu")
    (expected,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x.detach()), expected)


def test_autocast_makes_the_same_gradients_as_kept(monkeypatch):
    layer, x = layer_and_input()

    def through(layer, x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float()

    made = gradients(layer, x, through)
    monkeypatch.setattr("fastlm.nn.recompute._others_decide", lambda y: True)
    assert all(map(torch.equal, made, gradients(layer, x, through)))

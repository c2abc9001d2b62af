"""How right is right: an error counts against what plain PyTorch makes of the same inputs in the same dtype.

    max |got - truth|  ≤  factor · max |plain - truth|  +  ulp probe
    rms (got - truth)  ≤  1.5 · rms (plain - truth)     +  ulp probe

truth is the definition in fp64. plain is eager PyTorch, the worst of several operation orders, for a maximum is one
element's luck, and which element's depends on the processor that PyTorch has kernels for. The orders: ORDERS orders of
the channels, which every sum over them follows, scaled before the product and after it in turn; and each of them again,
in fp32 whatever the dtype, with the gradient through δ = ⟨grad, out⟩, where softmax's own rule cancels exactly in rows
that see one key. The ulp probe, 2 · max |(truth + 0.3 - 0.3) - truth| in that dtype, is what storing the result costs.
factor is 2, or 3 for long reductions such as a table's gradient. (The scheme of FlashAttention's tests, with the RMS
line added: a max hides systematic error.)
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import fastlm
from fastlm.ops.attention import LEARNED, ROWS, VECTORS, Arguments, attention, attention_backward, scores, values

ORDERS = 4
CHANNELS = (*ROWS, *VECTORS)  # what has a channel as its last dimension
FACTORS = {name: 3.0 for name in ("table", "bias", *VECTORS)}  # long reductions


class Yardstick(NamedTuple):
    """Of one call and the gradient of its output: out, lse and every gradient in fp64; how far plain PyTorch is off."""

    truth: dict[str, Tensor]
    plain: dict[str, tuple[float, float]]  # the largest max |plain - truth| of all orders, and the largest rms


def yardstick(args: Arguments, grad: Tensor) -> Yardstick:
    truth, errors = attention_truth(args, grad), {}
    for i in range(ORDERS):
        order = nth_order(i, args.q.shape[-1]).to(args.q.device)
        plain = attention_plain(args, grad, order, scale_first=i % 2 == 0)
        for results in (plain, attention_delta_form(args, grad, order)):
            for name, x in results.items():
                errors.setdefault(name, []).append(max_and_rms(x, truth[name]))
    return Yardstick(truth, {name: tuple(map(max, zip(*of, strict=True))) for name, of in errors.items()})


def nth_order(i: int, channels: int) -> Tensor:
    """The i-th order of the channels; the 0-th leaves them as they are."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(i)) if i else torch.arange(channels)


def max_and_rms(got: Tensor, truth: Tensor) -> tuple[float, float]:
    if truth.numel() == 0:
        return 0.0, 0.0
    error = (got.double() - truth).abs()
    return error.max().item(), error.square().mean().sqrt().item()


def assert_accurate(name: str, got: Tensor, against: Yardstick, ulps: float = 0.0) -> None:
    """Raise AssertionError unless `got` is as accurate as the rule at the top asks. NaN anywhere fails.

    ulps: of 1 + max |truth|, allowed on top: where a row sees one key, or a tensor is small, plain PyTorch may be lucky
    in every order.
    """
    truth = against.truth[name]
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)} instead of {list(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} of {got.numel()} elements are not finite"
    stored = truth.to(got.dtype)
    probe = 2 * ((stored + 0.3 - 0.3) - stored).abs().max().item()
    probe += ulps * torch.finfo(got.dtype).eps * (1 + stored.abs().max().item())
    factors, errors = {"max": FACTORS.get(name, 2.0), "rms": 1.5}, max_and_rms(got, truth)
    for kind, error, plain in zip(factors, errors, against.plain[name], strict=True):
        allowed = factors[kind] * plain + probe
        assert error <= allowed, f"{name}: {kind} error {error:.3e}, allowed {allowed:.3e}"


def attention_truth(args: Arguments, grad: Tensor) -> dict[str, Tensor]:
    """out and every gradient in fp64, by autograd through the definition."""
    leaves = leaves_of(args, torch.float64)
    out, lse = attention.definition(args._replace(**leaves))
    return with_gradients(out, leaves, grad.double()) | {"lse": lse.detach()}


def attention_plain(args: Arguments, grad: Tensor, order: Tensor, scale_first: bool) -> dict[str, Tensor]:
    """out and every gradient by eager PyTorch in the inputs' own dtype, channels in this order."""
    leaves = leaves_of(args)
    a = args._replace(**leaves)
    if scale_first:
        positions = {
            name: None if getattr(a, name) is None else a.scale * getattr(a, name)
            for name in ("q_position", "k_position")
        }
        if a.key_vectors is not None and a.k_position is None:
            positions["k_position"] = a.scale * a.k
        a = a._replace(q=a.scale * a.q, scale=1.0, **positions)
    a = _ordered(a, order)
    p = scores(a, a.q.dtype).softmax(-1).nan_to_num(0.0)
    return with_gradients(values(p, a)[..., order.argsort()], leaves, grad)


def attention_delta_form(args: Arguments, grad: Tensor, order: Tensor) -> dict[str, Tensor]:
    """out and every gradient in fp32, channels in this order, the gradient through δ = ⟨grad, out⟩ as every flash
    attention computes it.
    """
    leaves = {name: x.detach() for name, x in leaves_of(args, torch.float32).items()}
    a = _ordered(args._replace(**leaves), order)
    out, lse = attention.definition(a)
    needs_grad = [name in leaves for name in LEARNED]
    grads = attention_backward.definition(grad.float()[..., order], None, out, lse, a, needs_grad)
    made = {"out": out} | {name: x for name, x in zip(LEARNED, grads, strict=True) if name in leaves}
    return {name: x[..., order.argsort()] if name in ("out", *CHANNELS) else x for name, x in made.items()}


def _ordered(args: Arguments, order: Tensor) -> Arguments:
    given = {name: getattr(args, name) for name in CHANNELS}
    return args._replace(**{name: x[..., order] for name, x in given.items() if x is not None})


def leaves_of(args: Arguments, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The arguments that are learned, as leaves of a new graph."""
    given = {name: getattr(args, name) for name in LEARNED if getattr(args, name) is not None}
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()}


def with_gradients(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True)),
    }


def assert_attention_accurate(args: Arguments, against: Yardstick | None = None, ulps: float = 0.0) -> None:
    """Forward and every gradient of `attention`, as computed by the backend in force, against the rule."""
    grad = gradient_for(args)
    against = against or yardstick(args, grad)
    leaves = leaves_of(args)
    out, lse = attention(args._replace(**leaves))
    for name, got in with_gradients(out, leaves, grad).items():
        assert_accurate(name, got, against, ulps)
    if lse is not None:
        loose = 1e-4 if args.q.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(lse.detach().double(), against.truth["lse"], rtol=loose, atol=loose)


def assert_case_accurate(case, dtype: torch.dtype, device: torch.device) -> None:
    """The same for a case (cases.py), whose yardstick is made once for every backend and instruction set."""
    assert_attention_accurate(case.make(dtype, device), _yardstick_of(case, dtype, device))


@cache
def _yardstick_of(case, dtype: torch.dtype, device: torch.device) -> Yardstick:
    args = case.make(dtype, device)
    return yardstick(args, gradient_for(args))


def assert_repeats(args: Arguments, times: int = 20) -> None:
    """Output, log-sum-exp and every gradient, as computed by the backend in force: the same bits each of so many
    times.
    """
    first = None
    for _ in range(times):
        leaves = leaves_of(args)
        out, lse = attention(args._replace(**leaves, return_lse=True))
        got = with_gradients(out, leaves, gradient_for(args)) | {"lse": lse.detach()}
        first = got if first is None else first
        for name, x in got.items():
            assert torch.equal(x, first[name]), f"{name} differs in {(x != first[name]).sum()} of {x.numel()} elements"


def gradient_for(args: Arguments, seed: int = 0) -> Tensor:
    return torch.randn(args.q.shape, generator=torch.Generator().manual_seed(seed)).to(args.q)


def assert_far_scores_are_a_softmax(dtype, device):
    """Rows of which all scores are large and negative, masked by the dtype's least number, or so in part: the softmax
    they are.
    """
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, L, 16, generator=g).to(device, dtype) for L in (5, 70, 70))
    bias = torch.zeros(1, 1, 5, 70, dtype=dtype, device=device)
    bias[..., 1, :], bias[..., 2, :], bias[..., 3, 1:], bias[..., 4, :] = (
        -1e4,
        *[torch.finfo(dtype).min] * 2,
        max(-1e9, torch.finfo(dtype).min),
    )
    truth = ((q.double() @ k.double().mT) / 4 + bias.double()).softmax(-1) @ v.double()
    plain = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias.float())
    got = fastlm.attention(q, k, v, bias=bias)
    close = 2 * (plain - truth).abs().max() + 2 * torch.finfo(dtype).eps
    assert (got - truth).abs().max() <= close

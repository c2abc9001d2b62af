"""How right is right: an error counts against what plain PyTorch makes of the same inputs in the same dtype.

    max |got - truth|  ≤  factor · max |plain - truth|  +  ulp probe
    rms (got - truth)  ≤  1.5 · rms (plain - truth)     +  ulp probe

truth is the definition in fp64. plain is eager PyTorch in the dtype under test, the worst of three operation orders, so
that a lucky rounding cannot fail us: scaling before or after the product, and, in fp32 whatever the dtype, the gradient
through δ = ⟨grad, out⟩, where softmax's own rule cancels exactly in rows that see one key. The ulp probe, 2 · max
|(truth + 0.3 - 0.3) - truth| in that dtype, is what storing the result costs. factor is 2, or 3 for long reductions
such as a table's gradient. (The scheme of FlashAttention's tests, with the RMS line added: a max hides systematic
error.)"""

import torch
from torch import Tensor

import fastlm
from fastlm.ops.attention import LEARNED, VECTORS, Arguments, attention, attention_backward, scores, values


def assert_accurate(
    name: str, got: Tensor, truth: Tensor, plains: list[Tensor], factor: float = 2.0, ulps: float = 0.0
) -> None:
    """Raise AssertionError unless `got` is as accurate as the rule at the top asks. NaN anywhere fails.

    ulps: of 1 + max |truth|, allowed on top: where a row sees one key, or a tensor is small, plain PyTorch may be lucky
    in every order."""
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)} instead of {list(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} of {got.numel()} elements are not finite"
    stored = truth.to(got.dtype)
    probe = 2 * ((stored + 0.3 - 0.3) - stored).abs().max().item()
    probe += ulps * torch.finfo(got.dtype).eps * (1 + stored.abs().max().item())
    error = (got.double() - truth.double()).abs()
    plain = [(p.double() - truth.double()).abs() for p in plains]
    worst, allowed = error.max().item(), factor * max(p.max().item() for p in plain) + probe
    assert worst <= allowed, f"{name}: max error {worst:.3e}, allowed {allowed:.3e}"
    rms, allowed = _rms(error), 1.5 * max(_rms(p) for p in plain) + probe
    assert rms <= allowed, f"{name}: rms error {rms:.3e}, allowed {allowed:.3e}"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def attention_truth(args: Arguments, grad: Tensor) -> dict[str, Tensor]:
    """out and every gradient in fp64, by autograd through the definition."""
    leaves = leaves_of(args, torch.float64)
    out, lse = attention.definition(args._replace(**leaves))
    return with_gradients(out, leaves, grad.double()) | {"lse": lse.detach()}


def attention_plain(args: Arguments, grad: Tensor, scale_first: bool) -> dict[str, Tensor]:
    """out and every gradient by eager PyTorch in the inputs' own dtype; the order of scaling is the two orders'
    difference."""
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
    p = scores(a, a.q.dtype).softmax(-1).nan_to_num(0.0)
    return with_gradients(values(p, a), leaves, grad)


def attention_delta_form(args: Arguments, grad: Tensor) -> dict[str, Tensor]:
    """out and every gradient in fp32, the gradient through δ = ⟨grad, out⟩ as every flash attention computes it."""
    a = args._replace(**{name: t.detach() for name, t in leaves_of(args, torch.float32).items()})
    out, lse = attention.definition(a)
    grads = attention_backward.definition(
        grad.float(), None, out, lse, a, [getattr(a, name) is not None for name in LEARNED]
    )
    return {"out": out, **dict(zip(LEARNED, grads, strict=True))}


def leaves_of(args: Arguments, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The arguments that are learned, as leaves of a new graph."""
    given = {name: getattr(args, name) for name in LEARNED if getattr(args, name) is not None}
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()}


def with_gradients(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True)),
    }


FACTORS = {name: 3.0 for name in ("table", "bias", *VECTORS)}  # long reductions


def assert_attention_accurate(args: Arguments, seed: int = 0, ulps: float = 0.0) -> None:
    """Forward and every gradient of `attention`, as computed by the backend in force, against the rule."""
    grad = gradient_for(args, seed)
    truth = attention_truth(args, grad)
    plains = [attention_plain(args, grad, True), attention_plain(args, grad, False), attention_delta_form(args, grad)]
    leaves = leaves_of(args)
    out, lse = attention(args._replace(**leaves))
    got = with_gradients(out, leaves, grad)
    for name in got:
        assert_accurate(name, got[name], truth[name], [p[name] for p in plains], FACTORS.get(name, 2.0), ulps)
    if lse is not None:
        loose = 1e-4 if args.q.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(lse.detach().double(), truth["lse"], rtol=loose, atol=loose)


def assert_repeats(args: Arguments, times: int = 20) -> None:
    """Output, log-sum-exp and every gradient, as computed by the backend in force: the same bits each of so many
    times."""
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
    they are."""
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

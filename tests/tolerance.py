"""How right is right: an error counts against what plain PyTorch makes of the same inputs in the same dtype.

    max |got - truth|  ≤  factor · max |plain - truth|  +  ulp probe
    rms (got - truth)  ≤  1.5 · rms (plain - truth)     +  ulp probe

truth is the definition in fp64. plain is eager PyTorch in the dtype under test, the worst of three operation orders, so that
a lucky rounding cannot fail us: scaling before or after the product, and, in fp32 whatever the dtype, the gradient through
δ = ⟨grad, out⟩, where softmax's own rule cancels exactly in rows that see one key. The ulp probe, 2 · max |(truth + 0.3 - 0.3) - truth| in that dtype, is what
storing the result costs. factor is 2, or 3 for long reductions such as a table's gradient. (The scheme of
FlashAttention's tests, with the RMS line added: a max hides systematic error.)
"""

import torch
from torch import Tensor

from fastlm.ops.attention import _per_query_head, attention, attention_backward


def assert_accurate(name: str, got: Tensor, truth: Tensor, plains: list[Tensor], factor: float = 2.0) -> None:
    """Raise AssertionError unless `got` is as accurate as the rule at the top asks. NaN anywhere fails."""
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)} instead of {list(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} of {got.numel()} elements are not finite"
    stored = truth.to(got.dtype)
    probe = 2 * ((stored + 0.3 - 0.3) - stored).abs().max().item()
    error = (got.double() - truth.double()).abs()
    plain = [(p.double() - truth.double()).abs() for p in plains]
    worst, allowed = error.max().item(), factor * max(p.max().item() for p in plain) + probe
    assert worst <= allowed, f"{name}: max error {worst:.3e}, allowed {allowed:.3e}"
    rms, allowed = _rms(error), 1.5 * max(_rms(p) for p in plain) + probe
    assert rms <= allowed, f"{name}: rms error {rms:.3e}, allowed {allowed:.3e}"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def attention_truth(args: tuple, grad: Tensor) -> dict[str, Tensor]:
    """out and every gradient in fp64, by autograd through the definition."""
    q, k, v, table, *rest = args
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (q, k, v, table)]
    out, lse = attention.definition(*leaves, *rest)
    return _with_gradients(out, leaves, grad.double()) | {"lse": lse.detach()}


def attention_plain(args: tuple, grad: Tensor, scale_first: bool) -> dict[str, Tensor]:
    """out and every gradient by eager PyTorch in the inputs' own dtype; the order of scaling is the two orders' difference."""
    q, k, v, table, key_lengths, left, right, scale, offset = args
    q, k, v, table = leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (q, k, v, table)]
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    score = (scale * q) @ k.mT if scale_first else scale * (q @ k.mT)
    Lq, Lk = score.shape[-2:]
    if table is not None:
        score = score + table.unfold(-1, Lk, 1).flip(-2).to(score.dtype)
    j = torch.arange(Lk, device=q.device)
    d = j - (torch.arange(Lq, device=q.device)[:, None] + offset)
    visible = (d >= -left) & (d <= right)
    if key_lengths is not None:
        visible = visible & (j < key_lengths[:, None, None, None])
    p = score.masked_fill(~visible, torch.finfo(score.dtype).min).softmax(-1) * visible
    return _with_gradients(p @ v, leaves, grad)


def attention_delta_form(args: tuple, grad: Tensor) -> dict[str, Tensor]:
    """out and every gradient in fp32, the gradient through δ = ⟨grad, out⟩ as every flash attention computes it."""
    q, k, v, table, *rest = args
    q, k, v = q.float(), k.float(), v.float()
    out, lse = attention.definition(q, k, v, table, *rest)
    key_lengths, *scalars = rest
    grads = attention_backward.definition(grad.float(), q, k, v, table, key_lengths, out, lse, *scalars, table is not None)
    return {"out": out, **dict(zip(("dq", "dk", "dv", "dtable"), grads, strict=True))}


def _with_gradients(out, leaves, grad):
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(out, wanted, grad))
    named = {n: next(grads) for n, t in zip(("dq", "dk", "dv", "dtable"), leaves, strict=True) if t is not None}
    return {"out": out.detach(), **named}


FACTORS = {"dtable": 3.0}


def assert_attention_accurate(args: tuple, seed: int = 0) -> None:
    """Forward and every gradient of `attention`, as computed by the backend in force, against the rule."""
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)).to(args[0])
    truth = attention_truth(args, grad)
    plains = [attention_plain(args, grad, True), attention_plain(args, grad, False), attention_delta_form(args, grad)]
    q, k, v, table, *rest = args
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (q, k, v, table)]
    out, lse = attention(*leaves, *rest)
    got = _with_gradients(out, leaves, grad)
    for name in got:
        assert_accurate(name, got[name], truth[name], [p[name] for p in plains], FACTORS.get(name, 2.0))
    if lse is not None:
        torch.testing.assert_close(lse.double(), truth["lse"], rtol=1e-2 if q.dtype != torch.float32 else 1e-4, atol=1e-2 if q.dtype != torch.float32 else 1e-4)

"""Attention on a CPU as models run it, forward and backward, down to the parameters of the scheme.

    t5        bidirectional, gradient to the 32 buckets; PyTorch's way gathers an [H, L, L] bias and lets autograd scatter it back
    alibi     causal; PyTorch's way adds a ready-made [H, L, L] mask
    causal, none    no bias: scaled_dot_product_attention is the peer, whatever backend it takes
    small     the batch of a small model on a laptop, causal, where the calls themselves count

"plain", where it stands, is our own kernel without a bias: what the bias costs us.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timing import compare

import fastlm
from fastlm.positions import ALiBi, T5Bias

PROBLEMS = {  # name: (scheme, causal, B, H, L, D)
    **{f"{scheme}_{L}": (scheme, scheme in ("alibi", "causal"), 1, 12, L, 64) for scheme in ("t5", "alibi", "causal", "none") for L in (1024, 4096)},
    "small": ("causal", True, 8, 4, 128, 32),
}
CLOSE = {torch.float32: 5e-5, torch.bfloat16: 2e-2}  # a scatter of all scores into 32 sums is not more exact


@pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("direction", ["ahead", "around"])
def test_attention_to_the_parameters(problem, dtype, direction, smoke, limits, record):
    scheme, causal, B, H, L, D = PROBLEMS[problem]
    H, L = (2, L // 32) if smoke else (H, L)
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, H, L, D, generator=g).to(dtype) for _ in range(4))
    position = {"t5": T5Bias(H, causal=False), "alibi": ALiBi(H)}.get(scheme)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    learned = [] if position is None else list(position.parameters())
    dense = None if scheme != "alibi" else dense_bias(position, L).to(dtype).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)

    def peer():
        bias = dense_bias(position, L).to(dtype) if scheme == "t5" else dense
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal and bias is None)

    ours = partial(fastlm.attention, q, k, v, position=position, causal=causal)
    plain = partial(fastlm.attention, q, k, v, causal=causal)
    both = lambda run, wanted: torch.autograd.grad(run(), wanted, grad)
    for got, expected in zip(both(ours, leaves + learned), both(peer, leaves + learned), strict=True):
        error = (got - expected).float().norm() / expected.float().norm()
        assert error <= CLOSE[dtype], f"{problem}: a gradient is off by {error:.1e}"
    contestants = {"fastlm": (ours, leaves + learned), "sdpa" if position is None else "dense bias": (peer, leaves + learned)}
    if position is not None:
        contestants |= {"plain": (plain, leaves), "sdpa unbiased": (partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal), leaves)}
    calls = {name: run if direction == "ahead" else partial(both, run, wanted) for name, (run, wanted) in contestants.items()}
    row = compare({name: lambda call=call: [call] for name, call in calls.items()}, "clock", **limits).row(
        kind="attention", scheme=problem, direction={"ahead": "forward", "around": "both"}[direction], B=B, H=H, L=L, D=D,
        dtype=str(dtype).removeprefix("torch."), flops={"ahead": 4, "around": 14}[direction] * B * H * L * L * D / (2 if causal else 1),
    )  # fmt: skip
    record(row, calls["fastlm"])


def dense_bias(position, L: int) -> torch.Tensor:
    """[1, H, L, L], gathered as T5 and its kin do it, with autograd."""
    o = torch.arange(L)
    return position.bias((o - o[:, None]).flatten()).unflatten(1, (L, L))[None]

"""Attention on a CPU as models run it, forward and backward, down to the parameters of the scheme.

    t5        bidirectional, gradient to the 32 buckets; PyTorch's way gathers an [H, L, L] bias and scatters it back
    alibi     causal; PyTorch's way adds a ready-made [H, L, L] mask
    causal, none    no bias: scaled_dot_product_attention is the peer, whatever backend it takes
    small     the batch of a small model on a laptop, causal, where the calls themselves count
    t5 layer  fastlm.nn.Attention and Hugging Face's T5Attention with the same weights, projections included

"eager" is the formula in plain PyTorch; "plain", where it stands, our own kernel without a bias: what the bias costs
us. Rates count attention's own products, and are given as a share of torch.mm's in the same run and dtype; memory is
what a call makes the process grow by, results included.
"""

from functools import partial

import machine
import pytest
import torch
import torch.nn.functional as F
from timing import compare

import fastlm
from fastlm.positions import ALiBi, T5Bias

PROBLEMS = {  # name: (scheme, causal, B, H, L, D)
    **{
        f"{scheme}_{L}": (scheme, scheme in ("alibi", "causal"), 1, 12, L, 64)
        for scheme in ("t5", "alibi", "causal", "none")
        for L in (1024, 4096)
    },
    "small": ("causal", True, 8, 4, 128, 32),
}
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # a scatter of all scores into 32 sums is not more exact
LAYERS_CLOSE = {torch.float32: 5e-5, torch.bfloat16: 4e-2}

by_dtype = pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d).removeprefix("torch."))
by_direction = pytest.mark.parametrize("direction", ["ahead", "around"])


@pytest.fixture
def contest(limits, record, matmul):
    """contest(contestants, agree, grad, …): check that the first few, ours and its peers, make the same gradients; time
    all; record.

    contestants: {name: (function → out, what gets a gradient)}. checked: how many of the gradients; all if None.
    """

    def run(
        contestants: dict,
        agree: int,
        grad: torch.Tensor,
        direction: str,
        causal: bool,
        close: dict = CLOSE,
        checked: int | None = None,
        **problem,
    ):
        work = 14 * grad.numel() * problem["L"] if direction == "around" else 4 * grad.numel() * problem["L"]
        both = lambda name: torch.autograd.grad(contestants[name][0](), contestants[name][1], grad)
        ours, *peers = list(contestants)[:agree]
        for peer in peers:
            for got, expected in zip(both(ours)[:checked], both(peer)[:checked], strict=True):
                error = (got - expected).float().norm() / expected.float().norm()
                assert error <= close[grad.dtype], f"{problem}: a gradient is off from {peer}'s by {error:.1e}"
        calls = {name: run if direction == "ahead" else partial(both, name) for name, (run, _) in contestants.items()}
        row = compare({name: lambda call=call: [call] for name, call in calls.items()}, "clock", **limits).row(
            kind="attention", direction={"ahead": "forward", "around": "both"}[direction],
            dtype=str(grad.dtype).removeprefix("torch."), **problem,
            flops=work / (2 if causal else 1), matmul=matmul(grad.dtype),
            memory={name: machine.peak_growth(call) for name, call in calls.items()},
        )  # fmt: skip
        record(row, calls[ours])

    return run


@by_dtype
@pytest.mark.parametrize("problem", PROBLEMS)
@by_direction
def test_attention_to_the_parameters(problem, dtype, direction, smoke, contest):
    scheme, causal, B, H, L, D = PROBLEMS[problem]
    H, L = (2, L // 32) if smoke else (H, L)
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, H, L, D, generator=g).to(dtype) for _ in range(4))
    position = {"t5": T5Bias(H, causal=False), "alibi": ALiBi(H)}.get(scheme)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    learned = [] if position is None else list(position.parameters())
    future = torch.ones(L, L, dtype=torch.bool).triu(1)
    ready = dense_bias(position, L).to(dtype).masked_fill(future, -torch.inf) if scheme == "alibi" else None

    def peer():
        bias = dense_bias(position, L).to(dtype) if scheme == "t5" else ready
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal and bias is None)

    def eager():
        score = q @ k.mT * D**-0.5
        if position is not None:
            score = score + (dense_bias(position, L).to(dtype) if scheme == "t5" else ready)
        return (score.masked_fill(future, -torch.inf) if causal else score).softmax(-1) @ v

    attend = partial(fastlm.attention, q, k, v, causal=causal)
    contestants = {
        "fastlm": (partial(attend, position=position), leaves + learned),
        "sdpa" if position is None else "dense bias": (peer, leaves + learned),
        "eager": (eager, leaves + learned),
    }
    if position is not None:
        contestants |= {
            "plain": (attend, leaves),
            "sdpa unbiased": (partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal), leaves),
        }
    contest(contestants, 2, grad, direction, causal, scheme=problem, B=B, H=H, L=L, D=D)


@by_dtype
@pytest.mark.parametrize("L", [1024, 4096])
@by_direction
def test_t5_layer(L, dtype, direction, smoke, contest):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    H, L, D = (2, L // 32, 64) if smoke else (12, L, 64)
    torch.manual_seed(0)
    theirs = {}
    for way in ("eager", "sdpa"):
        config = T5Config(d_model=H * D, d_kv=D, num_heads=H, dropout_rate=0.0, attn_implementation=way)
        theirs[way] = T5Attention(config, has_relative_attention_bias=True).to(dtype)
        theirs[way].load_state_dict(theirs["eager"].state_dict())
    ours = fastlm.nn.Attention(H * D, H, position=T5Bias(H, causal=False), causal=False).to(dtype)
    of = theirs["eager"]
    with torch.no_grad():
        # T5 does not scale its scores
        ours.qkv.weight.copy_(torch.cat((D**0.5 * of.q.weight, of.k.weight, of.v.weight)))
        ours.out.weight.copy_(of.o.weight)
        ours.position.weight.copy_(of.relative_attention_bias.weight)
    x, grad = (torch.randn(1, L, H * D).to(dtype) for _ in range(2))
    x.requires_grad_()
    contestants = {"fastlm": (lambda: ours(x), [x, ours.out.weight, ours.position.weight])}
    for way, layer in theirs.items():
        contestants[f"transformers {way}"] = (
            lambda layer=layer: layer(x)[0],
            [x, layer.o.weight, layer.relative_attention_bias.weight],
        )
    checked = None if dtype == torch.float32 else 2  # the buckets' gradient in bf16 is off by a fifth there (FACTS.md)
    contest(contestants, 2, grad, direction, False, LAYERS_CLOSE, checked, scheme="t5 layer", B=1, H=H, L=L, D=D)


def dense_bias(position, L: int) -> torch.Tensor:
    """[1, H, L, L], gathered as T5 and its kin do it, with autograd."""
    o = torch.arange(L)
    return position.bias((o - o[:, None]).flatten()).unflatten(1, (L, L))[None]

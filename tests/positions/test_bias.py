"""Biases by distance against their papers and the models that have them: T5, ALiBi, KERPLE."""

import math

import pytest
import torch

import fastlm
from fastlm.positions import (
    ALiBi,
    Kerple,
    T5Bias,
    alibi_slopes,
    t5_bucket,
)

CAUSAL_EDGES = [
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    19,
    21,
    24,
    27,
    31,
    35,
    40,
    46,
    52,
    59,
    67,
    77,
    87,
    99,
    113,
]


SYMMETRIC_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


def test_t5_buckets_have_the_published_edges():
    n = torch.arange(300)
    causal = torch.bucketize(n, torch.tensor(CAUSAL_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=True), causal)
    assert not t5_bucket(n, causal=True).any()
    one_side = torch.bucketize(n, torch.tensor(SYMMETRIC_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=False), one_side)
    assert torch.equal(t5_bucket(n[1:], causal=False), one_side[1:] + 16)
    # the first of the far side is the near side's 0
    assert not (t5_bucket(torch.arange(-300, 300), causal=False) == 16).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 64), (64, 256)])
def test_t5_buckets_match_transformers(causal, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="pip install '.[test]'")
    d = torch.arange(-700, 700)
    theirs = t5.T5Attention._relative_position_bucket(d, not causal, buckets, max_distance)
    assert torch.equal(t5_bucket(d, causal, buckets, max_distance), theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias_matches_transformers(causal):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="pip install '.[test]'")
    theirs = t5.T5Attention(
        t5.T5Config(d_model=8, num_heads=2, d_kv=4, is_decoder=causal), has_relative_attention_bias=True
    )
    ours = T5Bias(2, causal=causal)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    dense = theirs.compute_bias(5, 200, past_seen_tokens=195)
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 200, 4), torch.randn(1, 2, 200, 4)
    hidden = torch.ones(5, 200).triu(196).bool() & causal
    expected = torch.softmax((q @ k.mT + dense).masked_fill(hidden, -torch.inf), -1) @ v
    torch.testing.assert_close(fastlm.attention(q, k, v, position=ours, causal=causal, scale=1.0), expected)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]))
    torch.testing.assert_close(alibi_slopes(12)[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    for heads in range(1, 113):  # MPT's construction: odd ranks, then even, of the next power of two
        power = 2 ** math.ceil(math.log2(heads))
        slopes = 2.0 ** (-8 * torch.arange(1, power + 1) / power)
        torch.testing.assert_close(
            alibi_slopes(heads), (torch.cat((slopes[1::2], slopes[::2]))[:heads] if power != heads else slopes)
        )


def test_alibi_is_linear_in_distance_and_unscaled():
    bias = ALiBi(8).bias(torch.arange(-5, 4))
    assert torch.equal(bias[0], -0.5 * torch.arange(-5, 4).abs())
    assert not list(ALiBi(8).parameters())
    learned = ALiBi(8, learned=True)
    learned.bias(torch.arange(-5, 1)).sum().backward()
    assert torch.equal(learned.slopes.grad, torch.full((8,), -15.0))


@pytest.mark.parametrize("heads", [1, 3, 6, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_matches_bloom(causal, heads):
    """Bloom adds slope · j, by the key alone: after a causal softmax that is the same, and its log-sum-exp is off by
    slope · i.
    """
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="pip install '.[test]'")
    q, k, v = (torch.randn(1, heads, 9, 4) for _ in range(3))
    i, j, slopes = torch.arange(9)[:, None], torch.arange(9), alibi_slopes(heads)
    by_key = bloom.build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).view(1, heads, 1, 9)
    torch.testing.assert_close(by_key, (slopes[:, None, None] * j)[None])
    score = q @ k.mT / 2 + (by_key.masked_fill(j > i, -torch.inf) if causal else -slopes[:, None, None] * (i - j).abs())
    out, lse = fastlm.attention(q, k, v, position=ALiBi(heads), causal=causal, return_lse=True)
    torch.testing.assert_close(out, score.softmax(-1) @ v)
    torch.testing.assert_close(lse, score.logsumexp(-1) - (slopes[:, None] * i[:, 0] if causal else 0))


def test_kerple_formula():
    scheme = Kerple(2)
    with torch.no_grad():
        scheme.r1.copy_(torch.tensor([1.0, 2.0])), scheme.r2.copy_(torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(
        scheme.bias(torch.tensor([-4, 0])), torch.tensor([[-math.log(3.0), 0.0], [-2 * math.log(13.0), 0.0]])
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (2, 3), (4, 3), (5, 6), (33, 40), (8, 12), (32, 17)])
def test_t5_buckets_stay_in_the_table(causal, buckets, max_distance):
    if not causal and buckets < 4:
        return
    found = t5_bucket(torch.arange(-5000, 5000), causal, buckets, max_distance)
    assert found.min() >= 0 and found.max() < buckets

"""score_mods that are a number by distance, as schemes; those that are not, refused; and the way back."""

import pytest
import torch
from torch import nn

import fastlm
from fastlm.positions import (
    ALiBi,
    DeBERTa,
    Kerple,
    NoPosition,
    RoPE,
    Shaw,
    T5Bias,
    alibi_slopes,
    from_score_mod,
    t5_bucket,
    to_score_mod,
)  # fmt: skip

H, L = 4, 12
SLOPES, TABLE = alibi_slopes(H), torch.randn(H, 2 * L - 1, generator=torch.Generator().manual_seed(0))


def alibi(score, b, h, q, kv):
    return score + SLOPES[h] * -(q - kv).abs()


def by_table(score, b, h, q, kv):
    return score + TABLE[h, kv - q + L - 1]


def far_is_worse(score, b, h, q, kv):
    return torch.where((q - kv).abs() > 3, score - 2.0, score)


class Buckets(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, H, generator=torch.Generator().manual_seed(1)))

    def forward(self, score, b, h, q, kv):
        return score + self.weight[t5_bucket(kv - q, False, 8, 10), h]


def dense(score_mod, n=L, scores=None):
    """The definition: every pair by itself."""
    at = torch.arange(n)
    scores = torch.zeros(1, H, n, n) if scores is None else scores
    pairs = [[score_mod(scores[0, h, i, j], torch.tensor(0), torch.tensor(h), at[i], at[j]) for i in at for j in at]
             for h in range(H)]  # fmt: skip
    return torch.stack([torch.stack(row) for row in pairs]).view(1, H, n, n)


@pytest.mark.parametrize(
    "score_mod", [alibi, by_table, far_is_worse, Buckets()], ids=["alibi", "by_table", "far_is_worse", "module"]
)
def test_a_number_by_distance_is_a_scheme(score_mod):
    q, k, v = (torch.randn(1, H, L, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    position = from_score_mod(score_mod, H, L)
    want = fastlm.attention(q, k, v, bias=dense(score_mod))
    torch.testing.assert_close(fastlm.attention(q, k, v, position=position), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fastlm.attention(q[:, :, 4:], k, v, position=position), want[:, :, 4:], rtol=1e-4,
                               atol=1e-5)  # fmt: skip


def test_what_it_has_learned_gets_gradients():
    score_mod, truth = Buckets(), T5Bias(H, causal=False, buckets=8, max_distance=10)
    truth.weight.data.copy_(score_mod.weight.data)
    position = from_score_mod(score_mod, H, L)
    assert dict(position.named_parameters()).keys() == {"score_mod.weight"}
    q = torch.randn(1, H, L, 8)
    for scheme in (position, truth):
        fastlm.attention(q, q, q, position=scheme).square().sum().backward()
    torch.testing.assert_close(score_mod.weight.grad, truth.weight.grad)


REFUSED = {
    "the score": lambda score, b, h, q, kv: 20 * torch.tanh(score / 20),
    "the row of the batch": lambda score, b, h, q, kv: score + b,
    "where the query stands": lambda score, b, h, q, kv: score + 0.1 * q,
    "where the query": lambda score, b, h, q, kv: score + torch.where(q + kv > 2 * L - 3, 1.0, 0.0),
    "gives scores that are not finite": lambda score, b, h, q, kv: torch.where(q >= kv, score, -torch.inf),
}


@pytest.mark.parametrize("words", REFUSED)
def test_more_than_that_is_refused(words):
    with pytest.raises(ValueError, match=words):
        from_score_mod(REFUSED[words], H, L)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="score_mod is a str; give a function"):
        from_score_mod("alibi", H, L)
    with pytest.raises(ValueError, match="length is 0"):
        from_score_mod(alibi, H, 0)
    q = torch.zeros(1, H, L + 1, 8)
    with pytest.raises(ValueError, match=r"looked at up to distance 11, and 13 queries from 0 on meet 13 keys"):
        fastlm.attention(q, q, q, position=from_score_mod(alibi, H, L))


@pytest.mark.parametrize("scheme", [ALiBi(H), T5Bias(H, causal=False), Kerple(H), NoPosition()], ids=lambda x: x.name)
@pytest.mark.parametrize("Lq", [L, 5])
def test_the_way_back(scheme, Lq):
    """FlexAttention, compiled for no device, computes what fastlm does."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k = torch.randn(1, H, Lq, 16), torch.randn(1, H, L, 16)
    want = fastlm.attention(q, k, k, position=None if isinstance(scheme, NoPosition) else scheme)
    with torch.no_grad():
        got = flex_attention(q, k, k, score_mod=to_score_mod(scheme, Lq, L))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if Lq == L and not isinstance(scheme, NoPosition):
        there_and_back = from_score_mod(to_score_mod(scheme, L, L), H, L)
        distance = torch.arange(1 - L, L)
        torch.testing.assert_close(there_and_back.bias(distance), scheme.bias(distance), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [RoPE(16), Shaw(H, 16), DeBERTa(64, H, 16)], ids=lambda x: x.name)
def test_no_way_back_for_what_changes_queries(scheme):
    with pytest.raises(ValueError, match=f"{type(scheme).__name__} changes queries or keys"):
        to_score_mod(scheme, L, L)

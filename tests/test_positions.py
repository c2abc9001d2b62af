"""Positional schemes against their papers and the checkpoints they must read."""

import math

import pytest
import torch

import fastlm
from fastlm import positions
from fastlm.positions import SCHEMES, ALiBi, Kerple, Position, RoPE, Sinusoidal, T5Bias, alibi_slopes, t5_bucket

CAUSAL_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
SYMMETRIC_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


def test_t5_buckets_have_the_published_edges():
    n = torch.arange(300)
    causal = torch.bucketize(n, torch.tensor(CAUSAL_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=True), causal)
    assert not t5_bucket(n, causal=True).any()
    one_side = torch.bucketize(n, torch.tensor(SYMMETRIC_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=False), one_side)
    assert torch.equal(t5_bucket(n[1:], causal=False), one_side[1:] + 16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 64), (64, 256)])
def test_t5_buckets_match_transformers(causal, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="pip install '.[test]'")
    d = torch.arange(-700, 700)
    theirs = t5.T5Attention._relative_position_bucket(d, not causal, buckets, max_distance)
    assert torch.equal(t5_bucket(d, causal, buckets, max_distance), theirs)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]))
    torch.testing.assert_close(alibi_slopes(12)[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    for heads in range(1, 113):  # MPT's construction: odd ranks, then even, of the next power of two
        power = 2 ** math.ceil(math.log2(heads))
        slopes = 2.0 ** (-8 * torch.arange(1, power + 1) / power)
        torch.testing.assert_close(alibi_slopes(heads), (torch.cat((slopes[1::2], slopes[::2]))[:heads] if power != heads else slopes))


def test_alibi_is_linear_in_distance_and_unscaled():
    bias = ALiBi(8).bias(torch.arange(-5, 4))
    assert torch.equal(bias[0], -0.5 * torch.arange(-5, 4).abs())
    assert not list(ALiBi(8).parameters())
    learned = ALiBi(8, learned=True)
    learned.bias(torch.arange(-5, 1)).sum().backward()
    assert torch.equal(learned.slopes.grad, torch.full((8,), -15.0))


def test_kerple_formula():
    scheme = Kerple(2)
    with torch.no_grad():
        scheme.r1.copy_(torch.tensor([1.0, 2.0])), scheme.r2.copy_(torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(scheme.bias(torch.tensor([-4, 0])), torch.tensor([[-math.log(3.0), 0.0], [-2 * math.log(13.0), 0.0]]))


def test_rope_scores_see_only_differences():
    q, k = torch.randn(1, 1, 1, 64, dtype=torch.float64), torch.randn(1, 1, 1, 64, dtype=torch.float64)
    rope = RoPE(64)
    turn = lambda x, p: fastlm.rotate(x, *(f(rope.angles(torch.tensor([float(p)], dtype=torch.float64))) for f in (torch.cos, torch.sin)))
    with fastlm.use_backend("reference"):  # the one that takes fp64
        scores = [(turn(q, p + 7) * turn(k, p)).sum() for p in (0, 100, 131_000)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_rope_layouts_differ_by_a_permutation():
    x = torch.randn(1, 2, 9, 16)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    angles = RoPE(16).angles(torch.arange(9.0, dtype=torch.float64)).float()
    interleaved = fastlm.rotate(x, angles.cos(), angles.sin(), layout="interleaved")
    half = fastlm.rotate(x[..., order], angles.cos(), angles.sin(), layout="half")
    torch.testing.assert_close(interleaved[..., order], half)


def test_rope_is_exact_at_far_positions():
    """fp32 angles are off by about 1e-2 at position 131k; ours must match fp64 to fp32's last bits."""
    cos, _ = RoPE(128).terms(1, 131_073).rotate_q
    exact = torch.cos(131_072 * 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128))
    assert (cos[0].double() - exact).abs().max() < 1e-7


def test_rope_matches_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="pip install '.[test]'")
    q = torch.randn(1, 2, 30, 32)
    terms = RoPE(32).terms(30, 30)
    cos, sin = (torch.cat((t, t), -1)[None] for t in terms.rotate_q)
    theirs, _ = llama.apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(fastlm.rotate(q, *terms.rotate_q), theirs)


def test_rope_turns_a_part():
    x = torch.randn(1, 1, 5, 32)
    terms = RoPE(32, fraction=0.25).terms(5, 5)
    turned = fastlm.rotate(x, *terms.rotate_q)
    assert torch.equal(turned[..., 8:], x[..., 8:]) and not torch.equal(turned[..., :8], x[..., :8])


def test_sinusoidal_shift_is_a_rotation():
    pe = Sinusoidal(64).embed(torch.arange(50)).double()
    pairs = pe.unflatten(-1, (32, 2))
    angles = 3 * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    sin, cos = pairs.unbind(-1)
    shifted = torch.stack((sin * angles.cos() + cos * angles.sin(), cos * angles.cos() - sin * angles.sin()), -1)
    torch.testing.assert_close(shifted[:-3], pairs[3:], rtol=1e-5, atol=1e-5)
    assert pe.abs().max() <= 1


def test_a_new_scheme_is_one_class():
    class Cliff(Position, name="cliff"):
        """Every key more than `reach` away costs the same."""

        def __init__(self, heads: int, reach: int = 4):
            super().__init__()
            self.drop, self.reach = torch.nn.Parameter(torch.ones(heads)), reach

        def bias(self, distance):
            return -self.drop[:, None] * (distance.abs() > self.reach)

    try:
        from fastlm.model import ModelConfig, Transformer

        model = Transformer(ModelConfig(position="cliff", dim=32, heads=2, layers=1, context=16))
        model(torch.zeros(1, 16, dtype=torch.long)).sum().backward()
        assert model.position.drop.grad is not None
    finally:
        del SCHEMES["cliff"]


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match="position 'rpoe' is unknown; choose from alibi"):
        positions.make("rpoe", heads=1)
    with pytest.raises(ValueError, match="head_dim 15"):
        RoPE(15)
    with pytest.raises(TypeError, match=r"asks for \['depth'\] without a default"):

        class Deep(Position, name="deep"):
            def __init__(self, depth):
                super().__init__()

    with pytest.raises(IndexError, match="129 positions, but the model learned 128"):
        positions.Learned(128, 4).embed(torch.arange(129))
    assert T5Bias(4).bias(torch.arange(-3, 1)).shape == (4, 4)

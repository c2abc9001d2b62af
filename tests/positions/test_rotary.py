"""Rotary and sinusoidal positions against their papers and transformers."""

import pytest
import torch

import fastlm
from fastlm.positions import (
    RoPE,
    Sinusoidal,
)


def test_rope_scores_see_only_differences():
    q, k = torch.randn(1, 1, 1, 64, dtype=torch.float64), torch.randn(1, 1, 1, 64, dtype=torch.float64)
    rope = RoPE(64)
    turn = lambda x, p: fastlm.rotate(
        x, *(f(rope.angles(torch.tensor([float(p)], dtype=torch.float64))) for f in (torch.cos, torch.sin))
    )
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


def test_rope_turns_fp64_by_fp64_angles():
    terms = RoPE(8).terms(3, 3, dtype=torch.float64)
    angles = torch.outer(
        torch.arange(3.0, dtype=torch.float64), 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    )
    torch.testing.assert_close(terms.rotate_q, (angles.cos(), angles.sin()), rtol=1e-15, atol=1e-15)
    assert RoPE(8).double().terms(3, 3).rotate_q[0].dtype == torch.float32

"""Stretched rotary frequencies against transformers' own."""

import pytest
import torch

from fastlm.positions import RoPE, frequencies

BASE, D = 10000.0, 64
HF = {
    "linear": (dict(factor=4.0), frequencies.interpolate(4.0)),
    "yarn": (dict(factor=8.0, original_max_position_embeddings=2048), frequencies.yarn(8.0, 2048)),
    "llama3": (
        dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        frequencies.llama3(8.0, 8192),
    ),
    "dynamic": (dict(factor=3.0), frequencies.ntk(3.0 * 2 - 2)),  # at twice the trained length
}


@pytest.mark.parametrize("kind", HF)
def test_matches_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, scaling = HF[kind]
    config = transformers.LlamaConfig(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, max_position_embeddings=16384,
        rope_parameters={"rope_type": kind, "rope_theta": BASE, **parameters},
    )  # fmt: skip
    theirs, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=2 * 16384)
    ours, our_magnitude = scaling(BASE, D)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-9)
    assert our_magnitude == pytest.approx(magnitude)


def test_interpolation_is_division_of_positions():
    plain, stretched = RoPE(D), RoPE(D, scaling=frequencies.interpolate(4.0))
    positions = torch.arange(0, 64, 4, dtype=torch.float64)
    assert torch.equal(stretched.angles(positions), plain.angles(positions / 4))


def test_proportional_layout_turns_the_first_pairs_of_the_whole_head():
    angles = RoPE(D, layout="proportional", fraction=0.25).angles(torch.tensor([3.0], dtype=torch.float64))[0]
    assert angles.shape == (D // 2,) and not angles[D // 8 :].any()
    torch.testing.assert_close(angles[: D // 8], 3 * BASE ** (-torch.arange(0, D // 4, 2, dtype=torch.float64) / D))


def test_proportional_matches_transformers():
    transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "proportional", "rope_theta": BASE, "partial_rotary_factor": 0.25}
    config = transformers.LlamaConfig(hidden_size=4 * D, num_attention_heads=4, head_dim=D, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["proportional"](config)
    torch.testing.assert_close(RoPE(D, layout="proportional", fraction=0.25).pitch.float(), theirs, rtol=1e-6, atol=0)


def test_frequencies_stay_exact_when_a_model_is_cast():
    rope = RoPE(D)
    exact = rope.pitch.clone()
    assert torch.equal(rope.to(torch.bfloat16).pitch, exact)


def test_yarn_sharpens():
    cos, sin = RoPE(D, scaling=frequencies.yarn(16.0, 4096)).terms(5, 5).rotate_k
    torch.testing.assert_close(
        cos**2 + sin**2, torch.full((5, D // 2), (0.1 * torch.tensor(16.0).log() + 1).item() ** 2)
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: frequencies.interpolate(0),
            "interpolate stretches positions by a factor, and 0 is none; give one > 0",
        ),
        (lambda: frequencies.ntk(-1.0), "ntk stretches positions by a factor, and -1.0 is none"),
        (lambda: frequencies.yarn(0, 4096), "yarn stretches positions by a factor, and 0 is none"),
        (lambda: frequencies.llama3(0.0, 8192), "llama3 stretches positions by a factor, and 0.0 is none"),
        (lambda: frequencies.yarn(4.0, 0), "yarn's original_context is 0; give the tokens the model was trained on"),
        (lambda: frequencies.llama3(8.0, 8192, low=4, high=4), "low 4 to high 4; give high > low"),
        (lambda: RoPE(2, scaling=frequencies.ntk(4.0)), r"2 turning channels have none; use interpolate\(4.0\)"),
        (lambda: RoPE(D, fraction=-0.5), r"fraction is -0.5; give the share of channels that turn, in \(0, 1\]"),
        (lambda: RoPE(D, fraction=2.0), "fraction is 2.0"),
        (
            lambda: RoPE(8, scaling=lambda base, channels: (torch.ones(2), 1.0)),
            r"frequencies of shape \[2\] for 8 channels, which turn in pairs; return \[4\]",
        ),
    ],
)
def test_what_cannot_turn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""The frequencies rotary positions turn with, and the ways to stretch them to contexts longer than those trained.

A scaling is a function of (base, channels) → (frequencies [channels/2] fp64 in radians per position, magnitude): cos
and sin are multiplied by the magnitude, which for YaRN sharpens the softmax. `fastlm.positions.RoPE(scaling=yarn(8.0,
4096))`. Numbers that are not positive and finite raise ValueError."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.checks import finite, positive

Scaling = Callable[[float, int], tuple[Tensor, float]]


def geometric(base: float, channels: int) -> Tensor:
    """base^(-2i/channels), i = 0 … channels/2 - 1 (Su et al. 2021)."""
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def unscaled(base: float, channels: int) -> tuple[Tensor, float]:
    return geometric(base, channels), 1.0


def interpolate(factor: float) -> Scaling:
    """Position interpolation: positions divided by factor (Chen et al. 2023)."""
    _check("interpolate", factor)
    return lambda base, channels: (geometric(base, channels) / factor, 1.0)


def ntk(factor: float) -> Scaling:
    """A larger base, so that slow pairs interpolate and fast ones keep their pitch ("NTK-aware", bloc97 2023)."""
    _check("ntk", factor)

    def scale(base: float, channels: int) -> tuple[Tensor, float]:
        if channels <= 2:
            raise ValueError(
                f"ntk stretches the pairs after the first, and {channels} turning channels have none; "
                f"use interpolate({factor})"
            )
        return geometric(base * factor ** (channels / (channels - 2)), channels), 1.0

    return scale


def yarn(factor: float, original_context: int, beta_fast: float = 32, beta_slow: float = 1) -> Scaling:
    """YaRN (Peng et al. 2024): pairs that turn more than beta_fast times in the original context stay, those that turn
    less than beta_slow interpolate, a ramp between; magnitude 0.1 ln(factor) + 1."""
    _check("yarn", factor, original_context)
    positive(beta_fast=beta_fast, beta_slow=beta_slow)
    if beta_fast < beta_slow:
        raise ValueError(
            f"yarn goes from beta_slow {beta_slow} up to beta_fast {beta_fast}; give beta_fast ≥ beta_slow"
        )

    def scale(base: float, channels: int) -> tuple[Tensor, float]:
        turns_at = lambda turns: channels * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))
        low, high = max(math.floor(turns_at(beta_fast)), 0), min(math.ceil(turns_at(beta_slow)), channels - 1)
        ramp = ((torch.arange(channels // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        plain = geometric(base, channels)
        return plain * (1 - ramp) + plain / factor * ramp, 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1

    return scale


def llama3(factor: float, original_context: int, low: float = 1, high: float = 4) -> Scaling:
    """Llama 3.1: wavelengths above original_context/low interpolate, below original_context/high stay, smooth
    between."""
    _check("llama3", factor, original_context)
    positive(low=low, high=high)
    if not high > low:
        raise ValueError(f"llama3 is smooth from low {low} to high {high}; give high > low")

    def scale(base: float, channels: int) -> tuple[Tensor, float]:
        plain = geometric(base, channels)
        turns = original_context * plain / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * smooth + plain / factor * (1 - smooth), 1.0

    return scale


def _check(name: str, factor: float, original_context: int = 1) -> None:
    if not (finite(factor) and factor > 0):
        raise ValueError(
            f"{name} stretches positions by a factor, and {factor!r} is none; "
            "give one > 0, such as new context / old context"
        )
    if not (finite(original_context) and original_context > 0):
        raise ValueError(
            f"{name}'s original_context is {original_context!r}; give the tokens the model was trained on, > 0"
        )

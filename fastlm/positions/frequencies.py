"""The frequencies rotary positions turn with, and the ways to stretch them to contexts longer than those trained.

A scaling is a function of (base, channels), where channels are those of a head that turn. It returns (frequencies
[channels/2] fp64 in radians per position, magnitude); cos and sin are multiplied by the magnitude, which sharpens the
softmax in YaRN. For example RoPE(64, scaling=yarn(8.0, 4096)). Numbers that are not positive and finite raise
ValueError.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.checks import finite, one_of, positive

Scaling = Callable[[float, int], tuple[Tensor, float]]


def geometric(base: float, channels: int) -> Tensor:
    """base^(-2i/channels) for i = 0 … channels/2 - 1: [channels/2] fp64 (Su et al. 2021)."""
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def unscaled(base: float, channels: int) -> tuple[Tensor, float]:
    """The frequencies as they are, with magnitude 1."""
    return geometric(base, channels), 1.0


def interpolate(factor: float) -> Scaling:
    """Position interpolation: every position is divided by factor (Chen et al. 2023).

    Args:
        factor: new context / trained context; positive.

    Returns:
        A scaling for `RoPE`, with magnitude 1.

    Raises:
        ValueError: for a factor that is not positive and finite.
    """
    _check("interpolate", factor)
    return lambda base, channels: (geometric(base, channels) / factor, 1.0)


def ntk(factor: float) -> Scaling:
    """A larger base: slow pairs are interpolated, fast ones keep their frequency ("NTK-aware", bloc97 2023).

    The base becomes base · factor^(channels / (channels - 2)).

    Args:
        factor: new context / trained context; positive.

    Returns:
        A scaling for `RoPE`, with magnitude 1. It raises ValueError where only one pair turns, which it cannot stretch.

    Raises:
        ValueError: for a factor that is not positive and finite.
    """
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
    """YaRN (Peng et al. 2024): fast pairs keep their frequency, slow ones are interpolated, with a linear ramp between.

    Args:
        factor: new context / trained context; positive.
        original_context: tokens of the context the model was trained on.
        beta_fast: pairs that turn more often than this within original_context keep their frequency. Default 32.
        beta_slow: pairs that turn less often than this are interpolated. Default 1.

    Returns:
        A scaling for `RoPE`, with magnitude 0.1 · ln(factor) + 1, or 1 where factor is at most 1.

    Raises:
        ValueError: for numbers that are not positive and finite, and for beta_fast < beta_slow.
    """
    _check("yarn", factor, original_context)
    positive(beta_fast=beta_fast, beta_slow=beta_slow)
    if beta_fast < beta_slow:
        raise ValueError(
            f"yarn goes from beta_slow {beta_slow} up to beta_fast {beta_fast}; give beta_fast ≥ beta_slow"
        )

    def scale(base: float, channels: int) -> tuple[Tensor, float]:
        fast, slow = (  # the channels that turn so often within the trained context
            channels * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (beta_fast, beta_slow)
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), channels - 1)
        ramp = ((torch.arange(channels // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        plain = geometric(base, channels)
        return plain * (1 - ramp) + plain / factor * ramp, 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1

    return scale


def llama3(factor: float, original_context: int, low: float = 1, high: float = 4) -> Scaling:
    """Llama 3.1's scaling: long wavelengths are interpolated, short ones stay, with a smooth change between.

    Args:
        factor: new context / trained context; positive.
        original_context: tokens of the context the model was trained on.
        low: wavelengths above original_context / low are interpolated. Default 1.
        high: wavelengths below original_context / high stay. Default 4.

    Returns:
        A scaling for `RoPE`, with magnitude 1.

    Raises:
        ValueError: for numbers that are not positive and finite, and unless high > low.
    """
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


SCALINGS: dict[str, Callable[..., Scaling]] = {"interpolate": interpolate, "ntk": ntk, "yarn": yarn, "llama3": llama3}


def named(kind: str, **options: float) -> Scaling:
    """The scaling called `kind`, for configs that are data: named("yarn", factor=8.0, original_context=4096).

    Args:
        kind: a key of SCALINGS.
        options: its arguments.

    Returns:
        A scaling for `RoPE`.

    Raises:
        ValueError: for a kind that is not in SCALINGS, and as the scaling itself does.
        TypeError: for arguments that it does not take.
    """
    one_of(SCALINGS, kind=kind)
    return SCALINGS[kind](**options)


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

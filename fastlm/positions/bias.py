"""Biases by distance: a number added to the score of a query and a key, as a function of how far apart they are."""

import math

import torch
from torch import Tensor, nn

from fastlm.checks import flag, whole
from fastlm.positions.base import Position, constants_device, wide
from fastlm.positions.rows import rows_of


class ALiBi(Position, name="alibi"):
    """Attention with linear biases (Press et al. 2022): the scaled score gains -slope · |distance|.

    Args:
        heads: number of heads, each with its own slope, see `alibi_slopes`; at least 1.
        learned: whether the slopes are a parameter, slopes [heads], and train. Default False.

    Raises:
        ValueError: for heads below 1, and for a `learned` that is not True or False.
    """

    def __init__(self, heads: int, learned: bool = False):
        super().__init__()
        whole(1, heads=heads)
        flag(learned=learned)
        if learned:
            self.slopes = nn.Parameter(torch.empty(heads))
            self.reset_parameters()
        else:
            with constants_device():
                self.register_buffer("slopes", alibi_slopes(heads), persistent=False)

    def reset_parameters(self) -> None:
        """Set learned slopes to those of `alibi_slopes`."""
        if isinstance(self.slopes, nn.Parameter):
            with torch.no_grad():  # counting by a sum works on a sharded tensor too
                self.slopes.copy_(
                    _slopes(torch.ones_like(self.slopes, dtype=torch.float64).cumsum(0), len(self.slopes))
                )

    def bias(self, distance: Tensor) -> Tensor:
        """-slope · |distance|: distance [n] int64 → [heads, n] fp32, or fp64 where the slopes are."""
        return -wide(self.slopes.to(distance.device))[:, None] * distance.abs()  # bf16 would round distances beyond 256


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi's heads (Press et al. 2022, and their code for other numbers of heads).

    With n heads, n a power of two, head h = 1 … n has 2^(-8h/n). Otherwise the first heads have the slopes of the
    power of two below n, and the rest every second slope of the power of two above.

    Args:
        heads: number of heads; at least 1.

    Returns:
        [heads] fp32.

    Raises:
        ValueError: unless heads is a whole number of at least 1.
    """
    whole(1, heads=heads)
    return _slopes(torch.arange(1, heads + 1, dtype=torch.float64), heads).float()


def _slopes(h: Tensor, heads: int) -> Tensor:
    """The slopes of the heads with these numbers, h [n] fp64 from 1 on."""
    power = 2 ** (int(heads).bit_length() - 1)
    return torch.where(h <= power, 2.0 ** (-8 * h / power), 2.0 ** (-4 * (2 * (h - power) - 1) / power))


class T5Bias(Position, name="t5"):
    """A learned bias for each head and bucket of distances (Raffel et al. 2020, sec. 2.1): see `t5_bucket`.

    Its parameter is weight [buckets, heads], as in T5 checkpoints.

    Args:
        heads: number of heads; at least 1.
        causal: the default, True, spends every bucket on keys up to the query; later ones, such as a prefix's, share
            the query's own bucket (T5's decoder). False gives half of the buckets to keys after the query (T5's
            encoder).
        buckets: number of buckets; at least 2, and 4 where not causal. Default 32.
        max_distance: distance in tokens from which on all share the last bucket of a side. Default 128.

    Raises:
        ValueError: unless at least one bucket of a side is exact and max_distance lies beyond the exact ones, which are
            half of each side's.
    """

    def __init__(self, heads: int, causal: bool = True, buckets: int = 32, max_distance: int = 128):
        super().__init__()
        whole(1, heads=heads, buckets=buckets, max_distance=max_distance)
        flag(causal=causal)
        _check_t5(causal, buckets, max_distance)
        self.causal, self.max_distance = causal, max_distance
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.reset_parameters()

    def bias(self, distance: Tensor) -> Tensor:
        """The bucket's bias: distance [n] int64 → [heads, n] in weight's dtype."""
        return rows_of(self.weight, t5_bucket(distance, self.causal, self.weight.shape[0], self.max_distance)).T


class UMT5Bias(T5Bias, name="umt5"):
    """T5's bias with a table for each layer (Chung et al. 2023, UniMax)."""

    per_layer = True


def t5_bucket(distance: Tensor, causal: bool, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """The bucket of each distance (Raffel et al. 2020): exact for near keys, logarithmic up to max_distance.

    Args:
        distance: [n] int64, key position minus query position.
        causal: whether all buckets are for keys up to the query; otherwise each side has half of them.
        buckets: number of buckets. Default 32.
        max_distance: distance in tokens from which on all share a side's last bucket. Default 128.

    Returns:
        [n] int64 in 0 … buckets - 1. The logarithm is fp32, as in T5's code: its rounding decides the edges of buckets.

    Raises:
        ValueError: as `T5Bias`.
    """
    _check_t5(causal, buckets, max_distance)
    if causal:
        first, n = torch.zeros_like(distance), (-distance).clamp(min=0)
    else:
        buckets //= 2
        first, n = (distance > 0) * buckets, distance.abs()
    exact = buckets // 2
    log_ratio = torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (log_ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(n < exact, n, far)


def _check_t5(causal: bool, buckets: int, max_distance: int) -> None:
    parts = 2 if causal else 4
    if not max_distance > buckets // parts >= 1:
        raise ValueError(
            f"buckets is {buckets}, of which {buckets // parts} are exact, and max_distance {max_distance}; "
            f"give buckets ≥ {parts} and max_distance > buckets // {parts}"
        )


class Kerple(Position, name="kerple"):
    """Kernelised relative bias, logarithmic form (Chi et al. 2022): -r₁ · log(1 + r₂ · |distance|).

    Its parameters are r1 and r2, [heads] each, kept at 0.01 or above where they are used.

    Args:
        heads: number of heads; at least 1.

    Raises:
        ValueError: for heads below 1.
    """

    def __init__(self, heads: int):
        super().__init__()
        whole(1, heads=heads)
        self.r1 = nn.Parameter(torch.empty(heads))
        self.r2 = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw r1 from U(0, 2) and r2 from U(0, 1)."""
        nn.init.uniform_(self.r1, 0, 2)
        nn.init.uniform_(self.r2, 0, 1)

    def bias(self, distance: Tensor) -> Tensor:
        """-r₁ · log(1 + r₂ · |distance|): distance [n] int64 → [heads, n] fp32, or fp64 where the parameters are."""
        r1, r2 = (wide(r).clamp(min=1e-2)[:, None] for r in (self.r1, self.r2))
        return -r1 * torch.log1p(r2 * distance.abs())

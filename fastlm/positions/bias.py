"""Biases by distance: a number added to the score of a query and a key, as a function of how far apart they are."""

import math

import torch
from torch import Tensor, nn

from fastlm.checks import flag, whole
from fastlm.positions.base import Position, constants_device, wide


class ALiBi(Position, name="alibi"):
    """Attention with linear biases (Press et al. 2022): -slope · |distance|, not scaled by 1/√D.

    Slopes are 2^(-8h/n) for n a power of two, filled up from the next power otherwise; learned=True trains them.
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
        if isinstance(self.slopes, nn.Parameter):
            with torch.no_grad():  # counting by a sum works on a sharded tensor too
                self.slopes.copy_(
                    _slopes(torch.ones_like(self.slopes, dtype=torch.float64).cumsum(0), len(self.slopes))
                )

    def bias(self, distance: Tensor) -> Tensor:
        return -wide(self.slopes.to(distance.device))[:, None] * distance.abs()  # bf16 would round distances beyond 256


def alibi_slopes(heads: int) -> Tensor:
    """[heads] fp32. For n = 2^k heads: 2^(-8h/n), h = 1 … n; else those of the power below, then every second of the
    next. Raises ValueError unless heads is a whole number of at least 1."""
    whole(1, heads=heads)
    return _slopes(torch.arange(1, heads + 1, dtype=torch.float64), heads).float()


def _slopes(h: Tensor, heads: int) -> Tensor:
    """The slopes of the heads with these numbers, h [n] fp64 from 1 on."""
    power = 2 ** (int(heads).bit_length() - 1)
    return torch.where(h <= power, 2.0 ** (-8 * h / power), 2.0 ** (-4 * (2 * (h - power) - 1) / power))


class T5Bias(Position, name="t5"):
    """A learned bias per head and bucket of distance (Raffel et al. 2020): exact near by, logarithmic to max_distance.

    weight [buckets, heads] as in T5 checkpoints. causal spends every bucket on keys before the query, and those after
    it, such as a prefix's, share the query's own; otherwise half of them serve keys after it. Raises ValueError unless
    max_distance is beyond the exact buckets, half of a side's, of which there is one at least."""

    def __init__(self, heads: int, causal: bool = True, buckets: int = 32, max_distance: int = 128):
        super().__init__()
        whole(1, heads=heads, buckets=buckets, max_distance=max_distance)
        flag(causal=causal)
        _check_t5(causal, buckets, max_distance)
        self.causal, self.max_distance = causal, max_distance
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.reset_parameters()

    def bias(self, distance: Tensor) -> Tensor:
        return self.weight[t5_bucket(distance, self.causal, self.weight.shape[0], self.max_distance)].T


def t5_bucket(distance: Tensor, causal: bool, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """distance [n] int64, key minus query → bucket [n] int64. The logarithm is fp32: its rounding sets the bin
    edges."""
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
    """Kernelised relative bias, logarithmic form (Chi et al. 2022, eq. 5): -r₁ · log(1 + r₂ · |distance|), r₁, r₂ > 0
    learned."""

    def __init__(self, heads: int):
        super().__init__()
        whole(1, heads=heads)
        self.r1 = nn.Parameter(torch.empty(heads))
        self.r2 = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.r1, 0, 2)
        nn.init.uniform_(self.r2, 0, 1)

    def bias(self, distance: Tensor) -> Tensor:
        r1, r2 = (wide(r).clamp(min=1e-2)[:, None] for r in (self.r1, self.r2))
        return -r1 * torch.log1p(r2 * distance.abs())

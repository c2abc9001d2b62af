"""Philox4x32-10: 128 random bits for each counter, without a state (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3").

The definition, in integer arithmetic that torch has on every device; kernels compute the same words.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of each counter, int64 tensors that hold 32 bits each; counters broadcast. seed: 64 bits, the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c0, c1, c2, c3


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x · m. int64 wraps, so the product's 64 bits are all there, whatever sign they spell."""
    product = x * m
    return product >> 32 & LOW, product & LOW


def dropout_mask(
    shape: tuple[int, int, int, int],
    dropout: float,
    seed: int,
    device: torch.device,
    first_query: int = 0,
    first_key: int = 0,
) -> Tensor:
    """[B, H, Lq, Lk] bool: which probabilities survive dropout. Counter (j div 4, i, b·H + h, 0), word j mod 4, where i
    and j count from first_query and first_key.
    """
    B, H, Lq, Lk = shape
    row = torch.arange(B * H, device=device)[:, None, None]
    i = torch.arange(first_query, first_query + Lq, device=device)[:, None]
    block = torch.arange(first_key // 4, -(-(first_key + Lk) // 4), device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = torch.stack([word >= threshold(dropout) for word in philox((block, i, row, zero), seed)], -1)
    return words.flatten(-2)[..., first_key % 4 :][..., :Lk].unflatten(0, (B, H))


def threshold(dropout: float) -> int:
    """A word below it drops: dropout to the nearest 2⁻³² that fits a word."""
    return min(round(dropout * 2**32), LOW)

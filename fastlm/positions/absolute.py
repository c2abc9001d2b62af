"""Schemes of absolute positions: none, or something added to the token embeddings. Attention sees nothing of them."""

import torch
from torch import Tensor, nn

from fastlm.checks import whole
from fastlm.positions import frequencies
from fastlm.positions.base import Position


class NoPosition(Position, name="none"):
    """No position information besides the causal mask (NoPE; Kazemnejad et al. 2023). It takes no arguments."""

    def bias(self, distance: Tensor) -> None:
        """None: nothing is added to the scores."""
        return None


class Learned(Position, name="learned"):
    """A learned vector for each absolute position, added to the token embeddings (GPT-2, BERT).

    Its parameter is weight [offset + context, dim].

    Args:
        context: positions that have a vector, 0 … context - 1; at least 1.
        dim: width of the model; at least 1.
        offset: rows before that of position 0, which no position takes: 2 in RoBERTa's and BART's checkpoints. Default
            0.

    Raises:
        ValueError: for a context or dim that is not a whole number of at least 1, and for a negative offset.
        IndexError: from `embed`, for positions past context.
    """

    def __init__(self, context: int, dim: int, offset: int = 0):
        super().__init__()
        whole(1, context=context, dim=dim)
        whole(0, offset=offset)
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(offset + context, dim))
        self.reset_parameters()

    def embed(self, positions: Tensor) -> Tensor:
        """The learned vectors of positions [L] or [B, L] int64: [..., L, dim] in weight's dtype."""
        rows = self.weight.shape[0] - self.offset
        if positions.ndim == 1 and len(positions) > rows:  # shapes only: reading a value would wait for the device
            raise IndexError(
                f"{len(positions)} positions, but the model learned {rows}; "
                "use a scheme that extrapolates, such as alibi"
            )
        return self.weight[positions + self.offset]


class Sinusoidal(Position, name="sinusoidal"):
    """Fixed sines and cosines, added to the token embeddings (Vaswani et al. 2017, sec. 3.5).

    PE(p, 2i) = sin(p / 10000^(2i/dim)) and PE(p, 2i+1) = cos(p / 10000^(2i/dim)): sines and cosines alternate.

    Args:
        dim: width of the model; even, at least 2.

    Raises:
        ValueError: for an odd dim, and one that is not a whole number of at least 2.
    """

    def __init__(self, dim: int):
        super().__init__()
        whole(2, dim=dim)
        if dim % 2:
            raise ValueError(f"sinusoidal positions pair channels, so dim must be even; got {dim}")
        self.dim = dim

    def embed(self, positions: Tensor) -> Tensor:
        """positions [L] or [B, L] → [..., L, dim] fp32; the angles are computed in fp64."""
        angles = positions.double()[..., None] * frequencies.geometric(10000.0, self.dim).to(positions.device)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).float()

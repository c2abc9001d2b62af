"""Schemes of absolute positions: none, or something added to the token embeddings. Attention sees nothing of them."""

import torch
from torch import Tensor, nn

from fastlm.checks import whole
from fastlm.positions import frequencies
from fastlm.positions.base import Position


class NoPosition(Position, name="none"):
    """No position information besides the causal mask (NoPE; Kazemnejad et al. 2023)."""

    def bias(self, distance: Tensor) -> None:
        return None


class Learned(Position, name="learned"):
    """A learned vector for each absolute position (GPT-2, BERT). Positions past `context` raise IndexError."""

    def __init__(self, context: int, dim: int):
        super().__init__()
        whole(1, context=context, dim=dim)
        self.weight = nn.Parameter(torch.empty(context, dim))
        self.reset_parameters()

    def embed(self, positions: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        if positions.ndim == 1 and len(positions) > rows:  # shapes only: reading a value would wait for the device
            raise IndexError(
                f"{len(positions)} positions, but the model learned {rows}; "
                "use a scheme that extrapolates, such as alibi"
            )
        return self.weight[positions]


class Sinusoidal(Position, name="sinusoidal"):
    """Fixed sines and cosines, interleaved: PE(p, 2i) = sin(p / 10000^(2i/dim)), PE(p, 2i+1) = cos (Vaswani et al.
    2017). Angles are fp64, what is added is fp32."""

    def __init__(self, dim: int):
        super().__init__()
        whole(2, dim=dim)
        if dim % 2:
            raise ValueError(f"sinusoidal positions pair channels, so dim must be even; got {dim}")
        self.dim = dim

    def embed(self, positions: Tensor) -> Tensor:
        angles = positions.double()[..., None] * frequencies.geometric(10000.0, self.dim).to(positions.device)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).float()

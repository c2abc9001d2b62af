"""The sizes that are timed: parameter lists of real models, attention problems of a fixed number of tokens, and losses
over vocabularies of real models.
"""

from dataclasses import dataclass
from math import prod

import torch

Shapes = list[tuple[int, ...]]


def gpt2(layers: int, dim: int, context: int = 1024, vocabulary: int = 50257) -> Shapes:
    """Every parameter of a GPT-2 (output weights tied to the embedding), in the model's order."""
    block = [
        (dim,),
        (dim,),
        (3 * dim, dim),
        (3 * dim,),
        (dim, dim),
        (dim,),
        (dim,),
        (dim,),
        (4 * dim, dim),
        (4 * dim,),
        (dim, 4 * dim),
        (dim,),
    ]
    return [(vocabulary, dim), (context, dim), *layers * block, (dim,), (dim,)]


PARAMETERS = {
    "gpt2-124M": gpt2(12, 768),
    "gpt-1.3B": gpt2(24, 2048, context=2048),
    "2000×(64×64)": 2000 * [(64, 64)],
}
SMOKE_PARAMETERS = {"smoke": gpt2(1, 32, context=8, vocabulary=50)}


def elements(shapes: Shapes) -> int:
    return sum(map(prod, shapes))


@dataclass(frozen=True)
class Attention:
    """Self-attention of q, k, v [B, H, L, D], causal, under a scheme of fastlm.positions."""

    scheme: str
    B: int
    H: int
    L: int
    D: int
    dtype: torch.dtype

    def flops(self, direction: str) -> float:
        """By the usual convention: two products forward, 2.5 times that backward, half of each for causal."""
        forward = 4 * self.B * self.H * self.L**2 * self.D / 2
        return {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction] * forward


@dataclass(frozen=True)
class Loss:
    """N rows of D channels, of which a share has targets, guessed among V words."""

    N: int
    V: int
    D: int
    dtype: torch.dtype
    targets: float = 1.0

    @property
    def flops(self) -> float:
        """Of the three products of the rows with a target: logits, and the gradients of hidden and weight."""
        return 6 * self.N * self.targets * self.V * self.D


def gpu_attention(scheme: str, L: int, D: int, tokens: int = 16384, dim: int = 2048) -> Attention:
    return Attention(scheme, tokens // L, dim // D, L, D, torch.bfloat16)

"""What stands inside a span, told from the tokens around it (Joshi et al. 2020, SpanBERT)."""

import torch
from torch import Tensor, nn

from fastlm.models.config import ModelConfig
from fastlm.models.heads import Factors
from fastlm.models.stack import make_norm
from fastlm.models.transformer import Transformer
from fastlm.nn import ACTIVATIONS, Embedding


class SpanBERT(nn.Module):
    """A model, and a head that predicts a span's tokens from the states of the two tokens beside it:

        h = norm(gelu(W₁ [x_before; x_after; p_place])),   y = norm(gelu(W₂ h)),   logits = y · head's matrix + its bias

    where place counts from the span's beginning (eq. 2).

    Args:
        config: the model's shape, with head "lm".

    Attributes:
        model: a `Transformer`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.model, self.activation = Transformer(config), config.activation
        self.places = Embedding(config.context, config.dim)
        self.inner, self.inner_norm = nn.Linear(3 * config.dim, config.dim), make_norm(config, config.dim)
        width = self.model.head.weight.shape[1]
        self.outer, self.outer_norm = nn.Linear(config.dim, width), make_norm(config, width)
        for matrix in (self.places, self.inner, self.outer):
            nn.init.normal_(matrix.weight, std=0.02)
        nn.init.zeros_(self.inner.bias), nn.init.zeros_(self.outer.bias)

    def states(self, tokens: Tensor) -> Tensor:
        """[B, L] int64 → [B, L, dim]."""
        return self.model.states(tokens)

    @property
    def head(self) -> nn.Module:
        """The model's."""
        return self.model.head

    def inside(self, before: Tensor, after: Tensor, place: Tensor) -> Factors:
        """before, after [B, n, dim], the states beside a token's span; place [B, n] int64, of the token in it, from 0
        on: what logits [B, n, vocab_size] are made of.
        """
        activation, x = ACTIVATIONS[self.activation], torch.cat((before, after, self.places(place)), -1)
        x = self.inner_norm(activation(self.inner(x)))
        x = self.outer_norm(activation(self.outer(x)))
        return Factors(x, self.head.weight, self.head.bias)

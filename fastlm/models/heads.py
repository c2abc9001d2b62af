"""What reads a model's states: probabilities of tokens, whether tokens were replaced, and labels of whole rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models.config import ModelConfig
from fastlm.models.stack import make_norm
from fastlm.nn import ACTIVATIONS


class Transform(nn.Module):
    """norm(activation(linear(x))): [..., dim] → [..., embedding_dim], before the head's matrix (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.linear = nn.Linear(config.dim, config.embedding_width)
        self.norm = make_norm(config, config.embedding_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(ACTIVATIONS[self.activation](self.linear(x)))


class LMHead(nn.Module):
    """States → logits of every token: [..., dim] → [..., vocab_size].

    Args:
        config: the model's shape.
        embedding: the model's token embedding, whose matrix is the head's too where config ties them.

    `hidden` is what the matrix reads, for a loss that computes no logits: logits = hidden(x) · weightᵀ + bias.
    """

    def __init__(self, config: ModelConfig, embedding: nn.Embedding):
        super().__init__()
        self.transform = Transform(config) if config.head_transform else None
        self.scale = config.dim**-0.5 if config.scale_logits else 1.0
        width = config.embedding_width if config.head_transform else config.dim
        self.weight = embedding.weight if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None

    def hidden(self, x: Tensor) -> Tensor:
        """[..., dim] → what the head's matrix reads, [..., embedding_dim]."""
        x = x if self.transform is None else self.transform(x)
        return x if self.scale == 1.0 else x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.hidden(x), self.weight, self.bias)


class DetectionHead(nn.Module):
    """States → the logit that a token was replaced: [..., dim] → [...] (ELECTRA's discriminator, Clark et al. 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.linear = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(ACTIVATIONS[self.activation](self.linear(x))).squeeze(-1)


class PairHead(nn.Module):
    """States → logits of a row's label, from its first token: [B, L, dim] → [B, labels] (Devlin et al. 2019).

    pool is BERT's pooler, dense and tanh, which its classifiers read too.
    """

    def __init__(self, dim: int, labels: int):
        super().__init__()
        self.pooler = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, labels)

    def pool(self, x: Tensor) -> Tensor:
        """[B, L, dim] → [B, dim]."""
        return torch.tanh(self.pooler(x[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(x))

"""What reads a model's states.

In pretraining: probabilities of tokens, whether tokens were replaced, labels of pairs. To fine-tune, a model is put
into one of `RowClassifier`, `TokenClassifier`, `SpanReader` and `ChoiceReader`.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import below_one, one_of, whole
from fastlm.models.config import ModelConfig
from fastlm.models.stack import make_norm
from fastlm.nn import ACTIVATIONS, Linear
from fastlm.nn.linear import linear

if TYPE_CHECKING:
    from fastlm.models.transformer import Transformer


class Transform(nn.Module):
    """norm(activation(linear(x))): [..., dim] → [..., embedding_dim], before the head's matrix (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.linear = Linear(config.dim, config.embedding_width)
        self.norm = make_norm(config, config.embedding_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(ACTIVATIONS[self.activation](self.linear(x)))


class Factors(NamedTuple):
    """What logits are made of, for a loss that makes none: hidden · weightᵀ + bias.

    Args:
        hidden: [..., D], what the head's matrix reads.
        weight: [V, D].
        bias: [V], or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self) -> Tensor:
        """[..., V]"""
        return linear(self.hidden, self.weight, self.bias)


class LMHead(nn.Module):
    """States → logits of every token: [..., dim] → [..., vocab_size].

    Args:
        config: the model's shape.
        embedding: the model's token embedding, whose matrix is the head's too where config ties them.
    """

    def __init__(self, config: ModelConfig, embedding: nn.Embedding):
        super().__init__()
        self.transform = Transform(config) if config.head_transform else None
        self.scale = config.dim**-0.5 if config.scale_logits else 1.0
        width = config.embedding_width if config.head_transform else config.dim
        self.weight = embedding.weight if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None

    def factors(self, x: Tensor) -> Factors:
        """[..., dim] → what the logits are made of."""
        x = x if self.transform is None else self.transform(x)
        return Factors(x if self.scale == 1.0 else x * self.scale, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.factors(x).logits()


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

    pool is BERT's pooler, dense and tanh, which its classifiers read too; without labels it is all: → [B, dim].
    """

    def __init__(self, dim: int, labels: int):
        super().__init__()
        self.pooler = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, labels) if labels else None

    def pool(self, x: Tensor) -> Tensor:
        """[B, L, dim] → [B, dim]."""
        return torch.tanh(self.pooler(x[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) if self.out is None else self.out(self.pool(x))


class Pooling(NamedTuple):
    """How a family's classifier reads a row: a token's state → [dropout] → [dense → activation → dropout] → linear.

    Args:
        token: which one's: the first, the last, the last that is no padding, or the last end-of-sequence token of
            `tokens`, in a decoder's states beside an encoder.
        activation: after a dense layer; None for no such layer, and for a linear layer without a bias.
        dropout_first: whether the state is dropped out too.
    """

    token: Literal["first", "last", "last real", "end"]
    activation: str | None
    dropout_first: bool


POOLINGS = {
    "bert": Pooling("first", "tanh", False),  # ALBERT too; BERT's pooler is the dense layer
    "roberta": Pooling("first", "tanh", True),
    "electra": Pooling("first", "gelu", True),
    "deberta": Pooling("first", "gelu", False),  # whose own pooler_dropout is 0
    "xlnet": Pooling("last", "tanh", False),
    "bart": Pooling("end", "tanh", True),
    "gpt2": Pooling("last real", None, False),
}


class Headed(nn.Module):
    """A model that a head is put on.

    Attributes:
        model: a `Transformer`.
    """

    model: "Transformer"

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.model.config

    def parameter_count(self) -> int:
        """Numbers trained, those of the head among them."""
        return sum(p.numel() for p in self.parameters())


class RowClassifier(Headed):
    """A model that labels whole rows: tokens [B, L] int64 → logits [B, labels]. One label is regression.

    Args:
        model: a `Transformer`.
        labels: how many; at least 1.
        pooling: how its family reads a row, by its name in POOLINGS.
        dropout: in [0, 1). None: model.config.dropout.
        end: number of the end-of-sequence token, where pooling reads that one's state ("bart").

    Raises:
        ValueError: for another pooling, and for "bart" without end.
    """

    def __init__(
        self, model: "Transformer", labels: int, pooling: str, dropout: float | None = None, end: int | None = None
    ):
        super().__init__()
        whole(1, labels=labels)
        one_of(POOLINGS, pooling=pooling)
        self.pooling, self.end, self.labels = POOLINGS[pooling], end, labels
        if self.pooling.token == "end" and end is None:
            raise ValueError(f"pooling {pooling!r} reads the end-of-sequence token's state; give its number as end")
        dim = model.config.dim
        self.model, self.dropout = model, _dropout(model, dropout)
        self.dense = nn.Linear(dim, dim) if self.pooling.activation else None
        self.out = nn.Linear(dim, labels, bias=self.dense is not None)
        _draw(self.dense, self.out)

    def forward(self, tokens: Tensor, decoder_tokens: Tensor | None = None, **options) -> Tensor:
        """Arguments are those of `Transformer.states`.

        Raises:
            ValueError: as `Transformer.states`; and where a row has no end-of-sequence token but should, which is
                looked up on CPUs alone.
        """
        if self.end is not None and decoder_tokens is not None and decoder_tokens.shape != tokens.shape:
            raise ValueError(
                f"decoder_tokens are {list(decoder_tokens.shape)} and tokens {list(tokens.shape)}, in which the end is "
                "looked for; give the same tokens shifted right by one, or none, which means that"
            )
        x = self.model.states(tokens, decoder_tokens, **options)
        at = self._place(tokens, options.get("attention_mask"))
        x = x[torch.arange(len(x), device=x.device), at]
        x = F.dropout(x, self.dropout, self.training) if self.pooling.dropout_first else x
        if self.dense is not None:
            x = ACTIVATIONS[self.pooling.activation](self.dense(x))
            x = F.dropout(x, self.dropout, self.training)
        return self.out(x)

    def _place(self, tokens: Tensor, real: Tensor | None) -> Tensor | int:
        """Where the token stands whose state is read: in each row, or in all."""
        if self.pooling.token == "first":
            return 0
        if self.pooling.token == "last" or (self.pooling.token == "last real" and real is None):
            return -1
        marked = real.bool() if self.pooling.token == "last real" else tokens == self.end
        if marked.device.type == "cpu" and not torch.compiler.is_compiling() and not marked.any(-1).all():
            what = "is padding throughout" if self.pooling.token == "last real" else f"has no token {self.end}, the end"
            raise ValueError(f"row {int((~marked.any(-1)).nonzero()[0])} {what}, so it cannot be read")
        return marked.shape[1] - 1 - marked.flip(-1).int().argmax(-1)


class TokenClassifier(Headed):
    """A model that labels tokens: tokens [B, L] int64 → logits [B, L, labels], or those of decoder_tokens.

    Args:
        model: a `Transformer`.
        labels: how many; at least 1.
        dropout: on the states, in [0, 1). None: model.config.dropout.
    """

    def __init__(self, model: "Transformer", labels: int, dropout: float | None = None):
        super().__init__()
        whole(1, labels=labels)
        self.model, self.dropout = model, _dropout(model, dropout)
        self.out = nn.Linear(model.config.dim, labels)
        _draw(self.out)

    def forward(self, tokens: Tensor, decoder_tokens: Tensor | None = None, **options) -> Tensor:
        """Arguments are those of `Transformer.states`."""
        x = self.model.states(tokens, decoder_tokens, **options)
        return self.out(F.dropout(x, self.dropout, self.training))


class SpanReader(TokenClassifier):
    """A model that marks a span: tokens [B, L] int64 → logits of its first and of its last token, [B, L] each.

    Args:
        model: a `Transformer`.
    """

    def __init__(self, model: "Transformer"):
        super().__init__(model, 2, dropout=0.0)

    def forward(self, tokens: Tensor, decoder_tokens: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
        """Arguments are those of `Transformer.states`."""
        return super().forward(tokens, decoder_tokens, **options).unbind(-1)

    @staticmethod
    def loss(logits: tuple[Tensor, Tensor], start: Tensor, end: Tensor) -> Tensor:
        """Mean cross entropy of starts and ends, [B] int64 each; places outside the row count for nothing."""
        of = lambda logits, place: F.cross_entropy(
            logits, place.where((place >= 0) & (place < logits.shape[1]), -100), ignore_index=-100
        )
        return (of(logits[0], start) + of(logits[1], end)) / 2


class ChoiceReader(RowClassifier):
    """A model that picks one of several texts: tokens [B, choices, L] int64 → logits [B, choices].

    Args:
        model, pooling, dropout, end: as in `RowClassifier`.
    """

    def __init__(self, model: "Transformer", pooling: str, dropout: float | None = None, end: int | None = None):
        super().__init__(model, 1, pooling, dropout, end)

    def forward(self, tokens: Tensor, decoder_tokens: Tensor | None = None, **options) -> Tensor:
        """Arguments are those of `Transformer.states`, tensors with a dimension of choices after the first."""
        flat = lambda x: x.flatten(0, 1) if isinstance(x, Tensor) else x
        options = {name: flat(x) for name, x in options.items()}
        return super().forward(flat(tokens), flat(decoder_tokens), **options).view(tokens.shape[:2])


def _dropout(model: "Transformer", dropout: float | None) -> float:
    dropout = model.config.dropout if dropout is None else dropout
    below_one(dropout=dropout)
    return dropout


def _draw(*layers: nn.Linear | None) -> None:
    """N(0, 0.02), and biases zero, as all these families draw their heads."""
    for layer in layers:
        if layer is not None:
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

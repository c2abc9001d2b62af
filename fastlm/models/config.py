"""The shape of a model as data."""

from dataclasses import dataclass
from typing import Literal

from fastlm import positions
from fastlm.nn import MLPS, NORMS


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only model. Each field says below what it is; every one has a default.

    Raises:
        ValueError: for values that are out of range, unknown, or do not fit together, when it is made.
    """

    vocab_size: int = 1024
    """Rows of the embedding; the tokenizer's size."""
    context: int = 128
    """Tokens a training row holds."""
    dim: int = 128
    """Width of the residual stream."""
    layers: int = 4
    """Blocks of attention and feed-forward layer."""
    heads: int = 4
    """Query heads; they must divide dim."""
    kv_heads: int | None = None
    """Key/value heads; None for as many as heads, fewer for grouped-query attention."""
    hidden: int | None = None
    """Width of the feed-forward layer; None for 4·dim, or 8/3·dim rounded up to a multiple of 32 when gated."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Of the input of each sublayer, and of the last block's output."""
    norm_eps: float = 1e-5
    """Added to the variance, or to the mean square for rmsnorm."""
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    """Feed-forward layer: fastlm.nn.GeluMLP or SwiGLU."""
    bias: bool = False
    """Biases in the linear layers and LayerNorms."""
    position: str = "rope"
    """A scheme of fastlm.positions, by its name in SCHEMES."""
    tie_embeddings: bool = True
    """Whether the head is the embedding's matrix."""
    dropout: float = 0.0
    """On the embeddings and on each residual branch while training; in [0, 1)."""

    def __post_init__(self):
        for name in ("vocab_size", "context", "dim", "layers", "heads", "kv_heads", "hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim; got dim {self.dim}, heads {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads; got heads {self.heads}, kv_heads {self.kv_heads}")
        for name, known in (("norm", NORMS), ("mlp", MLPS), ("position", positions.SCHEMES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(sorted(known))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        self.make_position()

    @property
    def head_dim(self) -> int:
        """Channels of a head, dim / heads."""
        return self.dim // self.heads

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward layer: hidden, or its default."""
        if self.hidden is not None:
            return self.hidden
        return 4 * self.dim if self.mlp == "gelu" else -(-8 * self.dim // 96) * 32

    @property
    def position_per_layer(self) -> bool:
        """Whether each layer has a scheme of its own."""
        return positions.SCHEMES[self.position].per_layer

    def make_position(self) -> positions.Position:
        """A new scheme of this config's position."""
        return positions.make(
            self.position, dim=self.dim, heads=self.heads, head_dim=self.head_dim, context=self.context, causal=True
        )

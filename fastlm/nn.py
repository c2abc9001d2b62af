"""Modules: attention with any positional scheme, and the feed-forward layers and norms language models are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import masks
from fastlm.functional import attention
from fastlm.positions import SCHEMES, Position, Terms, make


class Cache:
    """Keys and values of the tokens one attention layer has seen, for decoding: [B, Hk, L, D], kept as projected.

    Positions enter when attention runs, from where a key stands, so every scheme decodes alike. The rows of a batch grow
    together, and a cache does not know which of its keys are padding. Prompts of several lengths are padded on the left, and
    each call makes padding a segment of its own: segments=(of the new tokens [B, L], of all [B, len(cache) + L]). Padding on
    the right can be read, with key_lengths at each call, but not continued: new tokens would stand behind it.
    """

    def __init__(self):
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values; return all of them."""
        if self.key is not None:
            key, value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        self.key, self.value = key, value
        return key, value


class Attention(nn.Module):
    """Multi-head self-attention, grouped if kv_heads < heads: [B, L, dim] → [B, L, dim].

    position: a scheme of `fastlm.positions`, its name, or None if each call passes one (a model that shares a scheme among
    its layers). bias: whether the two linear layers have one. window: (left, right) keys around each query, or one int for
    both, see `fastlm.attention`. dropout: on the probabilities, while training. Raises ValueError when heads do not divide
    dim, or kv_heads heads, and for a window or a dropout that attention would refuse.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        position: str | Position | None = None,
        causal: bool = True,
        bias: bool = False,
        window: tuple[int | None, int | None] | int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or dim % heads or heads % kv_heads:
            raise ValueError(f"heads must divide dim and kv_heads must divide heads; got dim {dim}, heads {heads}, kv_heads {kv_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
        masks.band(causal, window)  # says what is wrong with a window before a model is built around it
        self.head_dim, self.causal, self.window, self.dropout = dim // heads, causal, window, dropout
        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        if isinstance(position, str):
            if position in SCHEMES and SCHEMES[position].embeds():
                raise ValueError(f"position {position!r} adds to token embeddings, which a layer does not see; it belongs to the model")
            position = make(position, dim=dim, heads=heads, head_dim=self.head_dim, causal=causal)
        self.position = position

    def forward(
        self,
        x: Tensor,
        *,
        position: Position | Terms | None = None,
        bias: Tensor | None = None,
        key_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        segments: Tensor | tuple[Tensor, Tensor] | None = None,
        order: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x [B, L, dim]. position: overrides the module's own. cache: L new tokens attend to it and join it, so that there are
        Lk = len(cache) + L keys; Lk = L without one.

        As in `fastlm.attention`: bias [1|B, 1|H, 1|L, 1|Lk]; key_lengths, prefix [B] int; segments [B, L] int, or (of queries
        [B, L], of keys [B, Lk]); order, ranks (of queries [B, L], of keys [B, Lk]) int.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if cache is not None:
            k, v = cache.extend(k, v)
        position = self.position if position is None else position
        o = attention(
            q, k, v, position=position, causal=self.causal, window=self.window, dropout=self.dropout if self.training else 0.0,
            bias=bias, key_lengths=key_lengths, prefix=prefix, segments=segments, order=order,
        )  # fmt: skip
        return self.out(o.transpose(1, 2).flatten(2))


class GELU(nn.Module):
    """The feed-forward layer of GPT-2: out(gelu(in(x))), tanh approximation."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.inner = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.inner(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama: out(silu(gate(x)) · up(x)); Shazeer 2020. gate and up are one matrix."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.inner = nn.Linear(dim, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inner(x).chunk(2, -1)
        return self.out(F.silu(gate) * up)


MLPS = {"gelu": GELU, "swiglu": SwiGLU}
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}

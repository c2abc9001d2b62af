"""Multi-head self-attention with any positional scheme."""

from torch import Tensor, nn

from fastlm import masks
from fastlm.nn.cache import Cache
from fastlm.nn.functional import attention
from fastlm.positions import SCHEMES, Position, Terms, make


class Attention(nn.Module):
    """Multi-head self-attention, grouped if kv_heads < heads: [B, L, dim] → [B, L, dim].

    position: a scheme of `fastlm.positions`, its name, or None if each call passes one (a model that shares a scheme
    among its layers). bias: whether the two linear layers have one. window: (left, right) keys around each query, or
    one int for both, see `fastlm.attention`. dropout: on the probabilities, while training. Raises ValueError when
    heads do not divide dim, or kv_heads heads, and for a window or a dropout that attention would refuse."""

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
            raise ValueError(
                f"heads must divide dim and kv_heads must divide heads; got dim {dim}, heads {heads}, kv_heads {kv_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
        masks.band(causal, window)  # says what is wrong with a window before a model is built around it
        self.head_dim, self.causal, self.window, self.dropout = dim // heads, causal, window, dropout
        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        if isinstance(position, str):
            if position in SCHEMES and SCHEMES[position].embeds():
                raise ValueError(
                    f"position {position!r} adds to token embeddings, which a layer does not see; it belongs to the model"
                )
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
        """x [B, L, dim]. position: overrides the module's own. cache: L new tokens attend to it and join it, so that
        there are Lk = len(cache) + L keys; Lk = L without one.

        As in `fastlm.attention`: bias [1|B, 1|H, 1|L, 1|Lk]; key_lengths, prefix [B] int; segments [B, L] int, or (of
        queries [B, L], of keys [B, Lk]); order, ranks (of queries [B, L], of keys [B, Lk]) int."""
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

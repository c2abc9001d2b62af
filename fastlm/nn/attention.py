"""Multi-head self-attention with any positional scheme."""

from torch import Tensor, nn

from fastlm import masks
from fastlm.checks import below_one, flag, whole
from fastlm.nn.cache import Cache
from fastlm.nn.functional import attention
from fastlm.positions import SCHEMES, Position, Terms, make


class Attention(nn.Module):
    """Multi-head self-attention, grouped if kv_heads < heads: [B, L, dim] → [B, L, dim].

    position: a scheme of `fastlm.positions`, its name, or None if each call passes one (a model that shares a scheme
    among its layers). bias: whether the two linear layers have one. window: (left, right) keys around each query, or
    one int for both, see `fastlm.attention`. dropout: on the probabilities, while training. Raises ValueError when
    heads do not divide dim, or kv_heads heads, and for what attention would refuse."""

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
        whole(1, dim=dim, heads=heads, kv_heads=kv_heads)
        if dim % heads or heads % kv_heads:
            raise ValueError(
                "heads must divide dim and kv_heads must divide heads; "
                f"got dim {dim}, heads {heads}, kv_heads {kv_heads}"
            )
        flag(causal=causal, bias=bias)
        below_one(dropout=dropout)
        masks.band(causal, window)  # says what is wrong with a window before a model is built around it
        self.head_dim, self.causal, self.window, self.dropout = dim // heads, causal, window, dropout
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        if isinstance(position, str):
            if position in SCHEMES and SCHEMES[position].embeds():
                raise ValueError(
                    f"position {position!r} adds to token embeddings, which a layer does not see; "
                    "it belongs to the model"
                )
            position = make(position, dim=dim, heads=heads, head_dim=self.head_dim, causal=causal)
        if not isinstance(position, (Position, type(None))):
            raise ValueError(
                f"position is {position!r}; give a scheme, such as fastlm.positions.ALiBi({heads}), or a name"
            )
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
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.dim:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"Attention takes x [B, L, dim] with dim {self.dim}; got {got}")
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if cache is not None:
            if not isinstance(cache, Cache):
                raise ValueError(f"cache is of type {type(cache).__name__}; give a fastlm.nn.Cache() for each layer")
            k, v = cache.extend(k, v)
        position = self.position if position is None else position
        o = attention(
            q, k, v, position=position, bias=bias, causal=self.causal, window=self.window, prefix=prefix,
            segments=segments, key_lengths=key_lengths, order=order, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out(o.transpose(1, 2).flatten(2))

"""Multi-head attention with any positional scheme: of a sequence to itself, and to another one."""

import torch
from torch import Tensor, nn

from fastlm import masks
from fastlm.checks import below_one, flag, positive, whole
from fastlm.nn import checks
from fastlm.nn.cache import KVCache, check_cache
from fastlm.nn.functional import attention
from fastlm.nn.linear import Linear, linear
from fastlm.positions import SCHEMES, Position, RelativeSegments, SharedTerms, Terms, make


class _Heads(nn.Module):
    """What both kinds of attention are made with: sizes, dropout, scale and softcap, checked."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None,
        head_dim: int | None,
        bias: bool,
        out_bias: bool | None,
        dropout: float,
        scale: float | None,
        softcap: float | None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        whole(1, dim=dim, heads=heads, kv_heads=kv_heads)
        if (head_dim is None and dim % heads) or heads % kv_heads:
            raise ValueError(
                "heads must divide dim and kv_heads must divide heads; "
                f"got dim {dim}, heads {heads}, kv_heads {kv_heads}"
            )
        head_dim = dim // heads if head_dim is None else head_dim
        whole(1, head_dim=head_dim)
        flag(bias=bias)
        below_one(dropout=dropout)
        positive(**({} if softcap is None else {"softcap": softcap}))
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.dropout, self.scale, self.softcap = dropout, scale, softcap
        self.out = Linear(heads * head_dim, dim, bias=bias if out_bias is None else out_bias)

    def split(self, x: Tensor, *heads: int) -> tuple[Tensor, ...]:
        """[B, L, n · head_dim] → [B, h, L, head_dim] for each h of heads; gradients are put together in one pass."""
        return tuple(part.transpose(1, 2) for part in x.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **options) -> Tensor:
        """`fastlm.attention` with this layer's scale, softcap and dropout, and the projection of what it gives: of all
        queries, or of those at rows [B, P].
        """
        dropout = self.dropout if self.training else 0.0
        o = attention(q, k, v, scale=self.scale, softcap=self.softcap, dropout=dropout, **options)
        o = o if rows is None else o.gather(2, _of_heads(rows, o))
        return self.out(o.transpose(1, 2).flatten(2))

    def check_input(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.dim:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{type(self).__name__} takes {name} [B, L, dim] with dim {self.dim}; got {got}")


class Attention(_Heads):
    """Multi-head self-attention with any positional scheme: [B, L, dim] → [B, L, dim].

    Args:
        dim: width of the model; heads must divide it unless head_dim is given.
        heads: number of query heads, H.
        kv_heads: number of key and value heads, which must divide heads (grouped-query attention). None: heads.
        head_dim: channels of a head, D. None: dim / heads.
        position: a scheme of `fastlm.positions`, or its name. None: each call may pass one, as models do that share a
            scheme among their layers.
        causal: whether later keys are hidden. Default True.
        bias: whether the linear layers have a bias. Default False.
        out_bias: whether the last of them has one. None: as bias says.
        key_bias: whether keys have one where queries and values do; not in DeBERTa v1. Default True.
        relative_segments: whether scores tell keys of a query's segment from others (XLNet). Default False.
        window: (left, right) keys visible around each query, or an int for both sides, as in `fastlm.attention`.
        dropout: share of the probabilities dropped while training, in [0, 1). Default 0.
        scale: of the products of queries and keys. None: `fastlm.attention`'s, 1/√D; T5 has 1.
        softcap: bounds the scaled products x as softcap · tanh(x / softcap); Gemma 2 has 50. None: no bound.

    Raises:
        ValueError: where heads do not divide dim or kv_heads heads, for a scheme that adds to token embeddings, and for
            what `fastlm.attention` would refuse.
        TypeError: for the name of a scheme that wants what a layer does not know.

    Vaswani et al. 2017, sec. 3.2.2; grouped heads: Ainslie et al. 2023.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        position: str | Position | None = None,
        causal: bool = True,
        bias: bool = False,
        out_bias: bool | None = None,
        key_bias: bool = True,
        relative_segments: bool = False,
        window: tuple[int | None, int | None] | int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, bias, out_bias, dropout, scale, softcap)
        flag(causal=causal, key_bias=key_bias, relative_segments=relative_segments)
        masks.band(causal, window)  # says what is wrong with a window before a model is built around it
        self.causal, self.window = causal, window
        self.qkv = Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias and key_bias)
        no_key = bias and not key_bias
        self.qv_bias = nn.Parameter(torch.zeros((heads + self.kv_heads) * self.head_dim)) if no_key else None
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
        self.relative_segments = RelativeSegments(heads, self.head_dim) if relative_segments else None

    def __prepare_scriptable__(self):  # torch.jit.script asks this of every module in a model
        raise RuntimeError("fastlm.nn.Attention is not for torch.jit.script; use torch.compile or torch.export")

    def forward(
        self,
        x: Tensor,
        *,
        keys: tuple[Tensor, Tensor] | None = None,
        position: Position | Terms | SharedTerms | None = None,
        bias: Tensor | None = None,
        key_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        segments: Tensor | tuple[Tensor, Tensor] | None = None,
        order: tuple[Tensor, Tensor] | None = None,
        groups: tuple[Tensor, Tensor] | None = None,
        rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Self-attention of x, or of x and the tokens in a cache: Lk = L keys, or len(cache) + L with one.

        Args:
            x: [B, L, dim] floats.
            keys: keys and values instead of x's, which `keys` made of a memory and x, or of another stream of the same
                tokens.
            position: a scheme or its `Terms`, instead of the module's own; or what the module's own scheme goes on
                from, which layers share.
            bias: [1|B, 1|H, 1|L, 1|Lk] floats, added to the scores.
            key_lengths: [B] int; keys past a row's length are padding.
            prefix: [B] int; keys before it are visible to every query.
            segments: [B, L] int, or (of queries [B, L], of keys [B, Lk]); queries see keys of their own segment.
            order: (ranks of queries [B, L], ranks of keys [B, Lk]) int; queries see keys that rank no higher.
            groups: (of queries [B, L], of keys [B, Lk]) int, which segments relative_segments tell apart.
            rows: [B, P] int64, where x's P rows stand, different places in each row of the batch, among the L queries
                that order has. None: x are all of them.
            cache: keys and values of the tokens before; the L new tokens attend to them and join them.

        All but x, keys, rows and cache are as in `fastlm.attention`.

        Returns:
            [B, L, dim], or [B, P, dim] with rows, in the dtype of the linear layers' output.

        Raises:
            ValueError: for shapes and types that do not fit.
        """
        self.check_input("x", x)
        q, *own = self._project(x, self.heads, *(2 * [self.kv_heads] if keys is None else []))
        k, v = own if keys is None else keys
        if cache is not None:
            check_cache(cache)
            k, v = cache.extend(k, v)
        if rows is not None:
            checks.rows(rows, x, order)
            q = q.new_zeros(*q.shape[:2], order[0].shape[1], self.head_dim).scatter(2, _of_heads(rows, q), q)
        return self.attend(
            q, k, v, rows, position=self.terms(position), bias=bias, causal=self.causal, window=self.window,
            prefix=prefix, segments=segments, key_lengths=key_lengths, order=order,
            group_bias=None if groups is None else self.relative_segments.group_bias(q, groups),
        )  # fmt: skip

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of x [B, Lk, dim], for `forward`: [B, Hk, Lk, D] each."""
        self.check_input("x", x)
        return self._project(x, self.kv_heads, self.kv_heads, first=self.heads)

    def _project(self, x: Tensor, *heads: int, first: int = 0) -> tuple[Tensor, ...]:
        """What the heads of qkv from the first on make of x: [B, L, dim] → [B, h, L, D] for each h of heads."""
        D, weight, bias = self.head_dim, self.qkv.weight, self.qkv.bias
        if self.qv_bias is not None:
            of_queries, of_values = self.qv_bias.split((self.heads * D, self.kv_heads * D))
            bias = torch.cat((of_queries, torch.zeros_like(of_values), of_values))
        rows = slice(first * D, (first + sum(heads)) * D)
        whole = bias is self.qkv.bias and rows == slice(0, len(weight))
        made = self.qkv(x) if whole else linear(x, weight[rows], None if bias is None else bias[rows])
        return self.split(made, *heads)

    def terms(self, position: Position | Terms | SharedTerms | None) -> Position | Terms | None:
        """What `fastlm.attention` takes as this layer's position."""
        if not isinstance(position, SharedTerms):
            return self.position if position is None else position
        return self.position.finish(position, self._project_rows)

    def _project_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[n, dim] → what queries' and keys' projections make of them, [H, n, D] and [Hk, n, D]."""
        return tuple(made[0] for made in self._project(rows[None], self.heads, self.kv_heads))


class CrossAttention(_Heads):
    """Multi-head attention of a sequence to another one, as a decoder's to its encoder's: [B, L, dim] → [B, L, dim].

    Args:
        dim: width of both sequences; heads must divide it unless head_dim is given.
        heads: number of query heads, H.
        kv_heads: number of key and value heads, which must divide heads. None: heads.
        head_dim: channels of a head, D. None: dim / heads.
        bias: whether the linear layers have a bias. Default False.
        dropout: share of the probabilities dropped while training, in [0, 1). Default 0.
        scale: of the products of queries and keys. None: 1/√D; T5 has 1.
        softcap: bounds the scaled products x as softcap · tanh(x / softcap). None: no bound.

    Raises:
        ValueError: where heads do not divide dim or kv_heads heads, and for values out of range.

    Vaswani et al. 2017, sec. 3.2.3.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, bias, None, dropout, scale, softcap)
        self.q = Linear(dim, heads * self.head_dim, bias=bias)
        self.kv = Linear(dim, 2 * self.kv_heads * self.head_dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_lengths: Tensor | None = None,
        segments: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attention of x to memory.

        Args:
            x: [B, L, dim] floats.
            memory: [B, S, dim] floats, the states attended to.
            key_lengths: [B] int; positions of memory past a row's length are padding.
            segments: (of x [B, L], of memory [B, S]) int; queries see keys of their own segment.
            cache: keeps memory's keys and values, so that later calls with it project none, whatever memory they give.

        Returns:
            [B, L, dim] in the dtype of the linear layers' output.

        Raises:
            ValueError: for shapes and types that do not fit.
        """
        self.check_input("x", x)
        if cache is not None:
            check_cache(cache)
        if cache is None or cache.memory is None:
            self.check_input("memory", memory)
            k, v = self.split(self.kv(memory), self.kv_heads, self.kv_heads)
            if cache is not None:
                cache.memory = k, v
        else:
            k, v = cache.memory
        (q,) = self.split(self.q(x), self.heads)
        return self.attend(q, k, v, key_lengths=key_lengths, segments=segments)


def _of_heads(rows: Tensor, x: Tensor) -> Tensor:
    """[B, P] → [B, H, P, D], an index along L of x [B, H, L, D]."""
    return rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])

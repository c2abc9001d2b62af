"""The functions people call: checked arguments, positions and masks turned into an op's plain numbers and vectors."""

import math

import torch
from torch import Tensor

from fastlm import masks
from fastlm.ops.attention import VECTORS, Arguments
from fastlm.ops.attention import attention as attention_op
from fastlm.ops.rotary import LAYOUTS
from fastlm.ops.rotary import rotate as rotate_op
from fastlm.positions import Position, Terms


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position: Position | Terms | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | int | None = None,
    prefix: Tensor | None = None,
    segments: Tensor | tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    group_bias: tuple[Tensor, Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
    offset: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with any positional scheme: [B, H, Lq, D] in query's dtype.

    query [B, H, Lq, D]; key, value [B, Hk, Lk, D] with H a multiple of Hk (grouped-query attention); fp32, bf16 or
    fp16. position: a scheme of `fastlm.positions`, or its `Terms` made once for all layers. bias [1|B, 1|H, 1|Lq,
    1|Lk]: added to the scores, after scale; its gradient has its own shape. group_bias: (x [B, H, Lq] fp32, groups of
    queries [B, Lq], groups of keys [B, Lk]); x is added likewise where a query's and a key's groups are equal (XLNet's
    segments).

    Masks, which combine. causal: key j is visible to query i when j ≤ i + offset. window: (left, right) keys around the
    query, None for no bound. prefix [B] int: keys before it are visible to every query. segments [B, L] int, or one for
    queries and one for keys: a query sees keys of its own segment, so packed documents do not mix.
    `masks.segments_of(cu_seqlens, L)` makes them; positions, of which scores see differences alone, need not start over
    in each, while queries and keys are packed alike. key_lengths [B] int: keys past a row's length are padding. order:
    (ranks of queries [B, Lq], ranks of keys [B, Lk]) int; a key is visible to queries that do not rank below it (for
    XLNet's query stream, which must not see its own token, take the ranks of queries minus 1). Queries that see no key
    give zeros, and zero gradients.

    dropout: on the probabilities, from a counter-based generator: the same seed drops the same ones on every backend.
    seed: 0 … 2⁶³ - 1; drawn from torch's generator if None; a captured CUDA graph repeats its own. scale: 1/√D unless
    given (1/√(3D) for DeBERTa's three products). offset: the first query's position, Lk - Lq unless given, so that the
    last query stands at the last key and a decoding step needs no argument. return_lse: also return log Σ exp(score),
    [B, H, Lq] fp32.

    Differentiable once. Gradients come from the log-sum-exp in fp32: where all of a row's scores are large, by -1e4
    say, they lose as many digits as it does; -inf, or a mask, gives zeros instead. Raises ValueError for shapes,
    dtypes, devices or values that do not fit."""
    _check_tensors(query=query, key=key, value=value)
    query, key, value = _autocast(query, key, value)
    _check_attention(query, key, value)
    B, H, Lq, D = query.shape
    Lk = key.shape[2]
    offset = Lk - Lq if offset is None else offset
    _check_numbers(scale, dropout, seed, causal, offset, Lq + Lk)
    terms = _terms(position, Lq, Lk, offset, query)
    vectors = terms.vectors
    scale = (vectors.terms * D) ** -0.5 if scale is None else scale
    segments = _members(
        "segments", (segments, segments) if isinstance(segments, Tensor) else segments, "of queries", "of keys"
    )
    order = _members("order", order, "ranks of queries", "ranks of keys")
    same, *groups = _members("group_bias", group_bias, "x", "groups of queries", "groups of keys")
    _check_terms(terms, H, Lq, Lk, D)
    _check_bias(bias, (B, H, Lq, Lk))
    for name, of_batch in (("key_lengths", key_lengths), ("prefix", prefix)):
        _check_integers(name, of_batch, (B,))
    for name, (of_queries, of_keys) in (("segments", segments), ("order", order), ("group_bias", groups)):
        _check_integers(f"{name} of queries", of_queries, (B, Lq))
        _check_integers(f"{name} of keys", of_keys, (B, Lk))
    if same is not None and (same.shape != (B, H, Lq) or not same.is_floating_point()):
        raise ValueError(
            f"group_bias must begin with [B, H, Lq] = [{B}, {H}, {Lq}] of floats; got {list(same.shape)} {same.dtype}"
        )
    _check_devices(
        query, bias=bias, key_lengths=key_lengths, prefix=prefix, segments=segments, order=order, group_bias=(same, *groups),
        position=(terms.table, *(terms.rotate_q or ()), *(terms.rotate_k or ()), *(x for x in vectors if isinstance(x, Tensor))),
    )  # fmt: skip
    if terms.rotate_q is not None:
        query = rotate(query, *terms.rotate_q, layout=terms.layout)
        key = rotate(key, *terms.rotate_k, layout=terms.layout)
    q_position = None
    if vectors.position_bias is not None:
        q_position = query + vectors.position_bias[:, None].to(query.dtype)
    if vectors.content_bias is not None:
        query = query + vectors.content_bias[:, None].to(query.dtype)
    left, right = masks.band(causal, window)
    if dropout and seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    (q_segments, k_segments), (q_ranks, k_ranks), (q_groups, k_groups) = segments, order, groups
    out, lse = attention_op(
        Arguments(
            q=query, k=key, v=value, table=terms.table, bias=bias, q_position=q_position, k_position=None, same=same,
            q_groups=q_groups, k_groups=k_groups, key_lengths=key_lengths, prefix=prefix, q_segments=q_segments,
            k_segments=k_segments, q_ranks=q_ranks, k_ranks=k_ranks, left=left, right=right, scale=scale, offset=offset,
            dropout=dropout, seed=0 if seed is None else seed, return_lse=return_lse,
            **{name: getattr(vectors, name) for name in VECTORS},
        )
    )  # fmt: skip
    return (out, lse) if return_lse else out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "half") -> Tensor:
    """Turn pairs of channels of x [B, H, L, D] by the angles whose cos and sin are given, [L, R/2] or [B, L, R/2] fp32.

    layout: "half" pairs channel i with i + R/2, "interleaved" pairs 2i with 2i + 1; channels from R on pass through.
    Raises ValueError when shapes do not fit. Su et al. 2021, eq. 34.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose from {', '.join(LAYOUTS)}")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, and its channels turn by fractions; give floats")
    if x.ndim != 4 or cos.shape != sin.shape or cos.ndim not in (2, 3) or cos.shape[-2] != x.shape[2]:
        raise ValueError(
            f"rotate takes x [B, H, L, D] and cos, sin [L, R/2] or [B, L, R/2]; got x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
        )
    if cos.ndim == 3 and cos.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows in its batch, cos and sin have {cos.shape[0]}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"cos and sin turn {2 * cos.shape[-1]} channels, but x has {x.shape[-1]}")
    _check_devices(x, cos=cos, sin=sin)
    return rotate_op(x, cos, sin, layout)


def _terms(position: Position | Terms | None, Lq: int, Lk: int, offset: int, query: Tensor) -> Terms:
    if position is None or Lq + Lk == 0:
        return Terms()
    if isinstance(position, Terms):
        return position
    if not isinstance(position, Position):
        raise ValueError(
            f"position is {position!r}; give a scheme, such as fastlm.positions.ALiBi(heads), or its terms"
        )
    if position.embeds():
        raise ValueError(
            f"position {position.name!r} adds to token embeddings, which attention does not see: add position.embed(...) there, and pass none here"
        )
    return position.terms(Lq, Lk, offset, query.device, torch.promote_types(query.dtype, torch.float32))


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where autocast is on, as torch's own attention does."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _check_tensors(**given: Tensor) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor; got {x!r}")


def _members(name: str, given: tuple | None, *what: str) -> tuple:
    """The members of an argument that is a tuple, or as many None."""
    if given is None:
        return (None,) * len(what)
    if not isinstance(given, (tuple, list)) or len(given) != len(what) or not all(isinstance(x, Tensor) for x in given):
        got = [type(x).__name__ for x in given] if isinstance(given, (tuple, list)) else type(given).__name__
        raise ValueError(f"{name} must be a tuple of tensors ({', '.join(what)}); got {got}")
    return tuple(given)


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention takes query [B, H, Lq, D] and key, value [B, Hk, Lk, D]; got {shapes}")
    if q.shape[3] == 0:
        raise ValueError(f"the head dimension is 0; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    ):
        raise ValueError(
            f"query, key and value must share one of fp32, bf16, fp16 (fp64 for the reference); got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(f"query, key and value must be on one device; got {q.device}, {k.device}, {v.device}")


def _check_numbers(
    scale: float | None, dropout: float, seed: int | None, causal: bool, offset: int, length: int
) -> None:
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ValueError(f"seed is {seed!r}; it must be an int in [0, 2⁶³)")
    if not isinstance(causal, bool):
        raise ValueError(f"causal is {causal!r}; give True or False")
    if not isinstance(offset, (int, torch.SymInt)) or abs(offset) + length >= masks.UNBOUNDED:
        raise ValueError(f"offset is {offset!r}; it must be an int, and stay with all positions below 2³⁰")


def _check_integers(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is None:
        return
    _check_tensors(**{name: x})
    if x.shape != shape or x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
        cure = ", so .expand it" if x.ndim == 2 and x.shape[0] == 1 and x.shape[1:] == shape[1:] else ""
        raise ValueError(f"{name} must be {list(shape)} integers; got {list(x.shape)} {x.dtype}{cure}")


def _check_terms(terms: Terms, heads: int, Lq: int, Lk: int, D: int) -> None:
    n = Lq + Lk - 1
    if terms.table is not None and terms.table.shape != (heads, n):
        raise ValueError(
            f"the position's table must be [heads, Lq + Lk - 1] = [{heads}, {n}]; got {list(terms.table.shape)}"
        )
    for name in ("query_vectors", "key_vectors", "value_vectors"):
        rows = getattr(terms.vectors, name)
        if rows is not None and rows.shape != (heads, n, D):
            raise ValueError(
                f"the position's {name} must be [heads, Lq + Lk - 1, D] = [{heads}, {n}, {D}]; got {list(rows.shape)}"
            )


def _check_devices(first: Tensor, **others: Tensor | tuple | None) -> None:
    for name, given in others.items():
        for x in given if isinstance(given, tuple) else (given,):
            if x is not None and x.device != first.device:
                raise ValueError(f"{name} is on {x.device} and query or x on {first.device}; move it there")


def _check_bias(bias: Tensor | None, full: tuple[int, ...]) -> None:
    if bias is not None and (
        bias.ndim != 4 or any(n not in (1, whole) for n, whole in zip(bias.shape, full, strict=True))
    ):
        raise ValueError(f"bias must be [B, H, Lq, Lk] = {list(full)}, each 1 to broadcast; got {list(bias.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(
            f"bias is {bias.dtype}, and it is added to scores; make a mask a bias by torch.where(mask, 0.0, -torch.inf)"
        )

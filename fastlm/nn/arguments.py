"""What `fastlm.attention` is given, checked, as what its op takes: positions and masks as numbers and vectors."""

import warnings
from typing import TypedDict

import torch
from torch import Tensor

from fastlm import masks
from fastlm.checks import flag
from fastlm.nn import checks
from fastlm.ops.attention import VECTORS, Arguments
from fastlm.ops.rotary import rotate
from fastlm.positions import Position, Terms


class CommonOptions(TypedDict, total=False):
    """What every kind of attention may be given, for signatures that type checkers see."""

    causal: bool
    window: tuple[int | None, int | None] | int | None
    prefix: Tensor | None
    key_lengths: Tensor | None
    order: tuple[Tensor, Tensor] | None
    group_bias: tuple[Tensor, Tensor, Tensor] | None
    dropout: float
    seed: int | None
    scale: float | None
    softcap: float | None


def arguments(
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
    softcap: float | None = None,
    offset: int | None = None,
    return_lse: bool = False,
) -> Arguments:
    """The op's arguments of a call of `fastlm.attention`, whose these are; raises what it says."""
    checks.tensors(query=query, key=key, value=value)
    query, key, value = autocast(query, key, value)
    checks.heads(query, key, value)
    B, H, Lq, D = query.shape
    Lk = key.shape[2]
    at_the_end, offset = offset is None, Lk - Lq if offset is None else offset
    flag(causal=causal, return_lse=return_lse)
    checks.numbers(scale, softcap, dropout, seed, offset, Lq + Lk)
    left, right = masks.band(causal, window)
    terms = terms_of(position, Lq, Lk, offset, query)
    if position is not None:
        checks.terms(terms, H, D, (Lq, Lk, offset))
    if terms.causal and right > 0 and Lk - 1 > offset:
        warn_of_later_keys(stacklevel=4)
    checks.bias(bias, (B, H, Lq, Lk))
    checks.integers("key_lengths", key_lengths, (B,))
    checks.integers("prefix", prefix, (B,))
    together = isinstance(segments, Tensor)
    segments = checks.members("segments", (segments, segments) if together else segments, "of queries", "of keys")
    order = checks.members("order", order, "ranks of queries", "ranks of keys")
    same, *groups = checks.members("group_bias", group_bias, "x", "groups of queries", "groups of keys")
    for name, (of_queries, of_keys) in (("segments", segments), ("order", order), ("group_bias", groups)):
        if of_queries is not None:
            checks.integers(f"{name} of queries", of_queries, (B, Lq))
            checks.integers(f"{name} of keys", of_keys, (B, Lk))
    checks.group_bias(same, (B, H, Lq))
    checks.devices(
        query, bias=bias, key_lengths=key_lengths, prefix=prefix, segments=segments, order=order,
        group_bias=(same, *groups), position=None if position is None else _tensors(terms),
    )  # fmt: skip
    counts_along_the_row = position is not None or min(left, right) < masks.UNBOUNDED
    if segments[0] is not None and not together and at_the_end and counts_along_the_row:
        checks.packed_alike(*segments)
    query = query if terms.rotate_q is None else turned(query, terms.rotate_q, terms.layout)
    key = key if terms.rotate_k is None else turned(key, terms.rotate_k, terms.layout)
    if dropout and seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))  # whatever device is the default
    (q_segments, k_segments), (q_ranks, k_ranks), (q_groups, k_groups) = segments, order, groups
    return Arguments(
        k=key, v=value, bias=bias, k_position=None, same=same, q_groups=q_groups, k_groups=k_groups,
        key_lengths=key_lengths, prefix=prefix, q_segments=q_segments, k_segments=k_segments, q_ranks=q_ranks,
        k_ranks=k_ranks, left=left, right=right, offset=offset, dropout=dropout, seed=0 if seed is None else seed,
        return_lse=return_lse, softcap=softcap, **by_distance(query, terms, scale),
    )  # fmt: skip


def by_distance(query: Tensor, terms: Terms, scale: float | None) -> dict:
    """The arguments that a scheme makes of queries, turned already, and distances. scale: None for the scheme's."""
    vectors, q_position = terms.vectors, None
    if vectors.position_bias is not None:
        q_position = query + vectors.position_bias[:, None].to(query.dtype)
    if vectors.content_bias is not None:
        query = query + vectors.content_bias[:, None].to(query.dtype)
    scale = (vectors.terms * query.shape[-1]) ** -0.5 if scale is None else scale
    return dict(
        q=query, q_position=q_position, table=terms.table, scale=scale, buckets=vectors.buckets,
        **{name: getattr(vectors, name) for name in VECTORS},
    )  # fmt: skip


def terms_of(position: Position | Terms | None, Lq: int, Lk: int, offset: int, query: Tensor) -> Terms:
    """The scheme's part in a call of this size."""
    if position is None or Lq + Lk == 0:
        return Terms()
    if isinstance(position, Terms):
        return position
    checks.position(position)
    return position.terms(Lq, Lk, offset, query.device, query.dtype)


def turned(x: Tensor, rotation: tuple[Tensor, Tensor], layout: str) -> Tensor:
    """x [B, H, L, D] turned by (cos, sin), checked."""
    checks.rotation(x, *rotation, layout)
    checks.devices(x, cos=rotation[0], sin=rotation[1])
    return rotate(x, *rotation, layout)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where autocast is on, as torch's own attention does."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _tensors(terms: Terms) -> tuple[Tensor | None, ...]:
    vectors = (x for x in terms.vectors if isinstance(x, Tensor))
    return (terms.table, *(terms.rotate_q or ()), *(terms.rotate_k or ()), *vectors)


def warn_of_later_keys(stacklevel: int) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            "position was made with causal=True and counts all keys after a query as one distance, and this call sees "
            "them; give the call causal=True, or the scheme causal=False",
            stacklevel=stacklevel,
        )

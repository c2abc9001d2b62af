"""Attention in which everything positional is a function of distance or of position, and nothing is an L×L tensor
unless the caller brings one.

    x[i, j] = scale · (⟨q[i], k[j]⟩ + ⟨q_position[i], query_vectors[d]⟩ + ⟨k_position[j], key_vectors[d]⟩)
    score[i, j] = cap(x[i, j]) + table[d] + bias[i, j] + same[i] · [q_groups[i] = k_groups[j]]
    out[i] = Σ over visible j of p̂[i, j] · (v[j] + value_vectors[d])

for each row of the batch and head, where cap(x) = softcap · tanh(x / softcap), or x without a softcap (Gemma Team 2024,
sec. 2), d = j - i + Lq - 1 counts distances from the farthest key before the last query on, p = softmax of score over
visible j, and p̂ = p, or p/(1 - dropout) where a Philox word keeps it and 0 elsewhere. A scheme gives its vectors by
distance: a row of its own for each (Transformer-XL), or one for a bucket of neighbouring distances, buckets[d] (Shaw,
DeBERTa), with which kernels may multiply once; autograd carries the rows' gradients on. So O(L) memory serves every
scheme.

Visible: -left ≤ j - (i + offset) ≤ right, or j < prefix; and j < key_lengths, q_segments[i] = k_segments[j], and
k_ranks[j] ≤ q_ranks[i]. A row that sees no key gives zeros, and zero gradients.

    q [B, H, Lq, D]  k, v [B, Hk, Lk, D]  table [H, n] fp32  bias [1|B, 1|H, 1|Lq, 1|Lk]  with n = Lq + Lk - 1
    q_position [B, H, Lq, D] (q itself if None)   query_vectors [H, n, D]       Shaw et al. 2018, eq. 4; Dai et al. 2019
    k_position [B, Hk, Lk, D] (k itself if None)  key_vectors [H, n, D]         He et al. 2021, position to content
    value_vectors [H, n, D]                                                     Shaw et al. 2018, eq. 3
    buckets [n] int, from 0 on, rising by 0 or 1: of each distance; all vectors are then [H, buckets, D]
    same [B, H, Lq] fp32  q_groups [B, Lq]  k_groups [B, Lk] int                Yang et al. 2019, relative segments
    key_lengths, prefix [B] int  q_segments, q_ranks [B, Lq] int  k_segments, k_ranks [B, Lk] int
"""

from typing import Annotated, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from fastlm.backends.dispatch import op
from fastlm.backends.philox import dropout_mask
from fastlm.masks import UNBOUNDED
from fastlm.ops.distances import by_distance, of_each, per_bucket, relative_shift

# ---------------------------------------------------------------------------------------------------------------------
# Definition


# Kinds of tensors, which backends treat alike. A new argument of a kind is named here and where it is computed with.
Rows = Annotated[Tensor, "[B, H or Hk, L, D], of queries or keys"]
Vectors = Annotated[Tensor, "[H, n, D], by distance, or [H, buckets, D]"]
Integers = Annotated[Tensor, "which have no gradient"]


class Arguments(NamedTuple):
    """The op's arguments by name, in its order."""

    q: Rows
    k: Rows
    v: Rows
    table: Tensor | None
    bias: Tensor | None
    q_position: Rows | None
    query_vectors: Vectors | None
    k_position: Rows | None
    key_vectors: Vectors | None
    value_vectors: Vectors | None
    buckets: Integers | None
    same: Tensor | None
    q_groups: Integers | None
    k_groups: Integers | None
    key_lengths: Integers | None
    prefix: Integers | None
    q_segments: Integers | None
    k_segments: Integers | None
    q_ranks: Integers | None
    k_ranks: Integers | None
    left: int
    right: int
    scale: float
    offset: int
    dropout: float
    seed: int
    return_lse: bool
    softcap: float | None = None
    # where dropout counts queries and keys from, of a call that is a block of a larger one
    first_query: int = 0
    first_key: int = 0

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, **changes) -> "Arguments":
        """Plain attention, with these changes."""
        numbers = dict(
            left=UNBOUNDED, right=UNBOUNDED, scale=q.shape[-1] ** -0.5, offset=0, dropout=0.0, seed=0, return_lse=False,
            first_query=0, first_key=0,
        )  # fmt: skip
        return cls(**dict.fromkeys(cls._fields) | dict(q=q, k=k, v=v) | numbers | changes)


def _names(*kinds: type) -> tuple[str, ...]:
    """The arguments of these kinds, in order."""
    hints = get_type_hints(Arguments, include_extras=True).items()
    return tuple(name for name, hint in hints if not {hint, *get_args(hint)}.isdisjoint(kinds))


ROWS, VECTORS, INTEGERS = _names(Rows), _names(Vectors), _names(Integers)
TENSORS = _names(Tensor, Rows, Vectors, Integers)
TERMS = tuple(name for name in TENSORS if name not in ("q", "k", "v"))  # what plain attention does without
LEARNED = tuple(name for name in TENSORS if name not in INTEGERS)  # what may want a gradient


@op
def attention(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return (out [B, H, Lq, D] in q's dtype, lse [B, H, Lq]): the file's formula, in fp32 (fp64 for fp64 inputs).

    lse is the natural logarithm of Σ exp(score) over visible keys, -inf where there is none. A backend may leave it
    empty unless return_lse, or unless its own gradient needs it.

    What q, k and the terms hold counts for visible pairs alone, be it infinite or NaN at others; v, and for gradients
    q, k and grad, must be finite at every query, and every key before key_lengths: sums over keys and over queries meet
    them with weight zero, and 0 · NaN is NaN.
    """
    a = _without_padding(a)
    score = scores(a, torch.promote_types(a.q.dtype, torch.float32))
    return values(_probabilities(score), a).to(a.q.dtype), score.logsumexp(-1)


@op(gradient_of=attention)
def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments, needs_grad: list[bool]
) -> list[Tensor]:
    """Gradients of the arguments in LEARNED, in their order and shapes, for grad = dL/dout and grad_lse = dL/dlse.

    needs_grad: which of them; the others come back empty. With p = exp(score - lse) and
    δ[i] = ⟨grad[i], out[i]⟩ - grad_lse[i]:

        dp̂[i, j] = ⟨grad[i], v[j] + value_vectors[d]⟩     dS = p ∘ (dp̂ ∘ keep/(1 - dropout) - δ)    dX = dS ∘ cap'(x)
        dq = scale · dX k    dk = scale · dXᵀ q    dv = p̂ᵀ grad    dtable[d] = Σ over b and (i, j) at d of dS

    and the vectors' gradients are those of matrices whose rows are gathered by distance. k and v may be some of the
    keys and values that out and lse are of: the gradients of all are then sums over such parts.
    """
    a = _without_padding(a)
    wide = torch.promote_types(a.q.dtype, torch.float32)
    q, k, v = a.q.to(wide), _per_query_head(a.k, a.q).to(wide), _per_query_head(a.v, a.q).to(wide)
    score = scores(a, wide)
    p = _probabilities(score) * _share(score, lse.to(wide))
    grad, out = grad.to(wide), out.to(wide)
    dp = grad @ v.mT
    if a.value_vectors is not None:
        dp = dp + relative_shift(grad @ of_each(a.value_vectors, a.buckets).to(wide).mT, a.k.shape[2])
    delta = (grad * out).sum(-1) - (0 if grad_lse is None else grad_lse.to(wide))
    ds = p * (_apply_dropout(dp, a) - delta[..., None])
    dropped, ds_scaled = _apply_dropout(p, a), a.scale * ds
    if a.softcap is not None:
        ds_scaled = ds_scaled * (1 - (_products(a, wide) / a.softcap).tanh().square())
    made = {"q": ds_scaled @ k, "k": _per_key_head(ds_scaled.mT @ q, a.k), "v": _per_key_head(dropped.mT @ grad, a.v)}
    if a.table is not None:
        made["table"] = by_distance(ds.sum(0)).sum(-2)
    if a.bias is not None:
        made["bias"] = ds.sum_to_size(a.bias.shape)
    if a.query_vectors is not None:
        spread = by_distance(ds_scaled)
        to, position = ("q", q) if a.q_position is None else ("q_position", a.q_position.to(wide))
        made[to] = made.get(to, 0) + spread @ of_each(a.query_vectors, a.buckets).to(wide)
        made["query_vectors"] = per_bucket((spread.mT @ position).sum(0), a.query_vectors, a.buckets)
    if a.key_vectors is not None:
        # seen from the keys, the last of which meets the same distances
        spread = by_distance(ds_scaled.flip(-1, -2).mT)
        to, position = ("k", a.k) if a.k_position is None else ("k_position", a.k_position)
        met, of_heads = of_each(a.key_vectors, a.buckets).to(wide), _per_query_head(position, a.q).to(wide)
        made[to] = made.get(to, 0) + _per_key_head((spread @ met).flip(-2), position)
        made["key_vectors"] = per_bucket((spread.mT @ of_heads.flip(-2)).sum(0), a.key_vectors, a.buckets)
    if a.value_vectors is not None:
        made["value_vectors"] = per_bucket((by_distance(dropped).mT @ grad).sum(0), a.value_vectors, a.buckets)
    if a.same is not None:
        made["same"] = (ds * _equal(a.q_groups, a.k_groups)).sum(-1)
    return in_order(made, a, needs_grad, lse)


def names_needing_grad(a: Arguments, needs_grad: list[bool]) -> list[str]:
    """The arguments in LEARNED that the call has and whose gradient is needed."""
    return [name for name, needs in zip(LEARNED, needs_grad, strict=True) if needs and getattr(a, name) is not None]


def in_order(made: dict[str, Tensor], a: Arguments, needs_grad: list[bool], like: Tensor) -> list[Tensor]:
    """attention_backward's result from gradients by name, in their arguments' dtypes; the others empty like `like`."""
    made = {name: made[name].to(getattr(a, name).dtype) for name in names_needing_grad(a, needs_grad) if name in made}
    return [made[name] if name in made else like.new_empty(0) for name in LEARNED]


def _without_padding(a: Arguments) -> Arguments:
    """Keys and values past a row's length as zeros: what padding holds, be it NaN, is nobody's concern."""
    if a.key_lengths is None:
        return a
    present = (torch.arange(a.k.shape[2], device=a.k.device) < a.key_lengths[:, None])[:, None, :, None]
    of_keys = ((name, getattr(a, name)) for name in ("k", "v", "k_position"))
    return a._replace(**{name: x.where(present, 0) for name, x in of_keys if x is not None})


def _products(a: Arguments, wide: torch.dtype) -> Tensor:
    """[B, H, Lq, Lk] in dtype `wide`: x of the formula."""
    Lq, Lk = a.q.shape[2], a.k.shape[2]
    score = a.q.to(wide) @ _per_query_head(a.k, a.q).to(wide).mT
    if a.query_vectors is not None:
        position = a.q if a.q_position is None else a.q_position
        score = score + relative_shift(position.to(wide) @ of_each(a.query_vectors, a.buckets).to(wide).mT, Lk)
    if a.key_vectors is not None:
        position = _per_query_head(a.k if a.k_position is None else a.k_position, a.q)
        met = position.to(wide).flip(-2) @ of_each(a.key_vectors, a.buckets).to(wide).mT
        score = score + relative_shift(met, Lq).mT.flip(-1, -2)
    return a.scale * score


def scores(a: Arguments, wide: torch.dtype) -> Tensor:
    """[B, H, Lq, Lk] in dtype `wide`, -inf where a key is not visible."""
    Lq, Lk = a.q.shape[2], a.k.shape[2]
    score = _products(a, wide)
    if a.softcap is not None:
        score = a.softcap * (score / a.softcap).tanh()
    if a.table is not None:
        score = score + relative_shift(a.table.to(wide)[:, None].expand(-1, Lq, -1), Lk)
    if a.bias is not None:
        score = score + a.bias.to(wide)
    if a.same is not None:
        score = score + a.same.to(wide)[..., None] * _equal(a.q_groups, a.k_groups)
    return score.masked_fill(~_visible(a), -torch.inf)


def values(p: Tensor, a: Arguments) -> Tensor:
    """Probabilities [B, H, Lq, Lk] → [B, H, Lq, D]: dropped out, then the weighted sum of values."""
    p = _apply_dropout(p, a)
    out = p @ _per_query_head(a.v, a.q).to(p.dtype)
    if a.value_vectors is not None:
        out = out + by_distance(p) @ of_each(a.value_vectors, a.buckets).to(p.dtype)
    return out


def _visible(a: Arguments) -> Tensor:
    """[1|B, 1, Lq, Lk] bool."""
    j = torch.arange(a.k.shape[2], device=a.q.device)
    d = j - (torch.arange(a.q.shape[2], device=a.q.device)[:, None] + a.offset)
    visible = ((d >= -a.left) & (d <= a.right))[None, None]
    if a.prefix is not None:
        visible = visible | (j < a.prefix[:, None, None, None])
    if a.key_lengths is not None:
        visible = visible & (j < a.key_lengths[:, None, None, None])
    if a.q_segments is not None:
        visible = visible & _equal(a.q_segments, a.k_segments)
    if a.q_ranks is not None:
        visible = visible & (a.k_ranks[:, None, None, :] <= a.q_ranks[:, None, :, None])
    return visible


def _equal(of_query: Tensor, of_key: Tensor) -> Tensor:
    return of_query[:, None, :, None] == of_key[:, None, None, :]


def _probabilities(score: Tensor) -> Tensor:
    """softmax over the keys; a row with no visible key is all zeros instead of NaN."""
    return score.softmax(-1).masked_fill((score == -torch.inf).all(-1, keepdim=True), 0.0)


def _share(score: Tensor, lse: Tensor) -> Tensor:
    """[B, H, Lq, 1]: how much of exp(lse) these scores are; 1, to the bit, where lse is theirs alone."""
    empty = (score == -torch.inf).all(-1, keepdim=True)
    of_these = score.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    return (of_these - lse[..., None]).masked_fill(empty, 0.0).exp()


def _apply_dropout(p: Tensor, a: Arguments) -> Tensor:
    if a.dropout == 0:
        return p
    kept = dropout_mask(p.shape, a.dropout, a.seed, p.device, a.first_query, a.first_key)
    return p * kept.to(p.dtype) / (1 - a.dropout)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """Repeat each key/value head for the group of query heads that share it (grouped-query attention)."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _per_key_head(x: Tensor, kv: Tensor) -> Tensor:
    """The way back for gradients: sum over each group."""
    return x.unflatten(1, (kv.shape[1], -1)).sum(2)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


def _save(ctx, inputs, output):
    (a,) = inputs
    ctx.save_for_backward(*output, *(getattr(a, name) for name in TENSORS))
    ctx.numbers = a._replace(**dict.fromkeys(TENSORS))
    ctx.set_materialize_grads(False)


@attention.gradient(save=_save)
def _(ctx, grad, grad_lse):
    out, lse, *tensors = ctx.saved_tensors
    a = ctx.numbers._replace(**dict(zip(TENSORS, tensors, strict=True)))
    needs_grad = [getattr(Arguments(*ctx.needs_input_grad), name) for name in LEARNED]
    grad = torch.zeros_like(out) if grad is None else grad
    grads = attention_backward(grad, grad_lse, out, lse, a, needs_grad)
    made = {name: g for name, g, needs in zip(LEARNED, grads, needs_grad, strict=True) if needs}
    return (Arguments(**dict.fromkeys(Arguments._fields) | made),)

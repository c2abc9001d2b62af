"""Attention in which everything positional is a function of distance or of position, and nothing is an L×L tensor
unless the caller brings one.

    score[i, j] = scale · (⟨q[i], k[j]⟩ + ⟨q_position[i], query_vectors[d]⟩ + ⟨k_position[j], key_vectors[d]⟩)
                + table[d] + bias[i, j] + same[i] · [q_groups[i] = k_groups[j]]
    out[i] = Σ over visible j of p̂[i, j] · (v[j] + value_vectors[d])

for each row of the batch and head, where d = j - i + Lq - 1 counts distances from the farthest key before the last
query on, p = softmax of score over visible j, and p̂ = p, or p/(1 - dropout) where a Philox word keeps it and 0
elsewhere. A scheme gives its vectors as rows by distance: one row of a learned table repeated over a bucket (Shaw,
DeBERTa), or a row of its own for each (Transformer-XL); autograd carries their gradients on. So O(L) memory serves
every scheme.

Visible: -left ≤ j - (i + offset) ≤ right, or j < prefix; and j < key_lengths, q_segments[i] = k_segments[j], and
k_ranks[j] ≤ q_ranks[i]. A row that sees no key gives zeros, and zero gradients.

    q [B, H, Lq, D]  k, v [B, Hk, Lk, D]  table [H, n] fp32  bias [1|B, 1|H, 1|Lq, 1|Lk]  with n = Lq + Lk - 1
    q_position [B, H, Lq, D] (q itself if None)   query_vectors [H, n, D]       Shaw et al. 2018, eq. 4; Dai et al. 2019
    k_position [B, Hk, Lk, D] (k itself if None)  key_vectors [H, n, D]         He et al. 2021, position to content
    value_vectors [H, n, D]                                                     Shaw et al. 2018, eq. 3
    same [B, H, Lq] fp32  q_groups [B, Lq]  k_groups [B, Lk] int                Yang et al. 2019, relative segments
    key_lengths, prefix [B] int  q_segments, q_ranks [B, Lq] int  k_segments, k_ranks [B, Lk] int
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backends.dispatch import op
from fastlm.backends.philox import kept
from fastlm.masks import UNBOUNDED

# ---------------------------------------------------------------------------------------------------------------------
# Definition


class Arguments(NamedTuple):
    """The op's arguments by name, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    bias: Tensor | None
    q_position: Tensor | None
    query_vectors: Tensor | None
    k_position: Tensor | None
    key_vectors: Tensor | None
    value_vectors: Tensor | None
    same: Tensor | None
    q_groups: Tensor | None
    k_groups: Tensor | None
    key_lengths: Tensor | None
    prefix: Tensor | None
    q_segments: Tensor | None
    k_segments: Tensor | None
    q_ranks: Tensor | None
    k_ranks: Tensor | None
    left: int
    right: int
    scale: float
    offset: int
    dropout: float
    seed: int
    return_lse: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, **given) -> "Arguments":
        """Plain attention, with what is given changed."""
        numbers = dict(
            left=UNBOUNDED, right=UNBOUNDED, scale=q.shape[-1] ** -0.5, offset=0, dropout=0.0, seed=0, return_lse=False
        )
        return cls(**dict.fromkeys(cls._fields) | dict(q=q, k=k, v=v) | numbers | given)


LEARNED = Arguments._fields[:11]  # what may want a gradient
TENSORS = Arguments._fields[:19]


@op
def attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bias: Tensor | None,
    q_position: Tensor | None, query_vectors: Tensor | None, k_position: Tensor | None, key_vectors: Tensor | None,
    value_vectors: Tensor | None, same: Tensor | None, q_groups: Tensor | None, k_groups: Tensor | None,
    key_lengths: Tensor | None, prefix: Tensor | None, q_segments: Tensor | None, k_segments: Tensor | None,
    q_ranks: Tensor | None, k_ranks: Tensor | None,
    left: int, right: int, scale: float, offset: int, dropout: float, seed: int, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out [B, H, Lq, D] in q's dtype, lse [B, H, Lq]): the file's formula, in fp32 (fp64 for fp64 inputs).

    lse is the natural logarithm of Σ exp(score) over visible keys, -inf where there is none. A backend may leave it
    empty unless return_lse, or unless its own gradient needs it.

    What q, k and the terms hold counts for visible pairs alone, be it infinite or NaN at others; v, and for gradients
    q, k and grad, must be finite at every query, and every key before key_lengths: sums over keys and over queries meet
    them with weight zero, and 0 · NaN is NaN.
    """
    a = Arguments(
        q, k, v, table, bias, q_position, query_vectors, k_position, key_vectors, value_vectors, same, q_groups, k_groups,
        key_lengths, prefix, q_segments, k_segments, q_ranks, k_ranks, left, right, scale, offset, dropout, seed, return_lse,
    )  # fmt: skip
    a = _without_padding(a)
    score = scores(a, torch.promote_types(q.dtype, torch.float32))
    return values(_probabilities(score), a).to(q.dtype), score.logsumexp(-1)


@op
def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bias: Tensor | None,
    q_position: Tensor | None, query_vectors: Tensor | None, k_position: Tensor | None, key_vectors: Tensor | None,
    value_vectors: Tensor | None, same: Tensor | None, q_groups: Tensor | None, k_groups: Tensor | None,
    key_lengths: Tensor | None, prefix: Tensor | None, q_segments: Tensor | None, k_segments: Tensor | None,
    q_ranks: Tensor | None, k_ranks: Tensor | None,
    left: int, right: int, scale: float, offset: int, dropout: float, seed: int, return_lse: bool,
    wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the arguments in LEARNED, in their order and shapes, for grad = dL/dout and grad_lse = dL/dlse.

    wanted: which of them; the others come back empty. With δ[i] = ⟨grad[i], out[i]⟩ - grad_lse[i]:

        dp̂[i, j] = ⟨grad[i], v[j] + value_vectors[d]⟩     dS = p ∘ (dp̂ ∘ keep/(1 - dropout) - δ)
        dq = scale · dS k    dk = scale · dSᵀ q    dv = p̂ᵀ grad    dtable[d] = Σ over b and (i, j) at d of dS

    and the vectors' gradients are those of matrices whose rows are gathered by distance.
    """
    a = Arguments(
        q, k, v, table, bias, q_position, query_vectors, k_position, key_vectors, value_vectors, same, q_groups, k_groups,
        key_lengths, prefix, q_segments, k_segments, q_ranks, k_ranks, left, right, scale, offset, dropout, seed, return_lse,
    )  # fmt: skip
    a = _without_padding(a)
    k, v, wide = a.k, a.v, torch.promote_types(q.dtype, torch.float32)
    p = _probabilities(scores(a, wide))
    grad, out = grad.to(wide), out.to(wide)
    dp = grad @ _per_query_head(v, q).to(wide).mT
    if value_vectors is not None:
        dp = dp + _at_pairs(grad @ value_vectors.to(wide).mT, k.shape[2])
    delta = (grad * out).sum(-1) - (0 if grad_lse is None else grad_lse.to(wide))
    ds = p * (_dropped(dp, a) - delta[..., None])
    kept_p, ds_scaled = _dropped(p, a), scale * ds
    q_, k_ = q.to(wide), _per_query_head(k, q).to(wide)
    grads = {
        "q": ds_scaled @ k_,
        "k": _per_key_head(ds_scaled.mT @ q_, k),
        "v": _per_key_head(kept_p.mT @ grad, v),
    }
    if table is not None:
        grads["table"] = _by_distance(ds.sum(0)).sum(-2)
    if bias is not None:
        grads["bias"] = ds.sum_to_size(bias.shape)
    if query_vectors is not None:
        spread = _by_distance(ds_scaled)
        to = "q" if q_position is None else "q_position"
        grads[to] = grads.get(to, 0) + spread @ query_vectors.to(wide)
        grads["query_vectors"] = (spread.mT @ (q if q_position is None else q_position).to(wide)).sum(0)
    if key_vectors is not None:
        # seen from the keys, the last of which meets the same distances
        spread = _by_distance(ds_scaled.flip(-1, -2).mT)
        to, like = ("k", k) if k_position is None else ("k_position", k_position)
        grads[to] = grads.get(to, 0) + _per_key_head((spread @ key_vectors.to(wide)).flip(-2), like)
        grads["key_vectors"] = (spread.mT @ _per_query_head(like, q).to(wide).flip(-2)).sum(0)
    if value_vectors is not None:
        grads["value_vectors"] = (_by_distance(kept_p).mT @ grad).sum(0)
    if same is not None:
        grads["same"] = (ds * _equal(q_groups, k_groups)).sum(-1)
    return [
        grads[name].to(getattr(a, name).dtype) if want and name in grads else lse.new_empty(0)
        for name, want in zip(LEARNED, wanted, strict=True)
    ]


def _without_padding(a: Arguments) -> Arguments:
    """Keys and values past a row's length as zeros: what padding holds, be it NaN, is nobody's concern."""
    if a.key_lengths is None:
        return a
    present = (torch.arange(a.k.shape[2], device=a.k.device) < a.key_lengths[:, None])[:, None, :, None]
    padded = {
        name: getattr(a, name).where(present, 0) for name in ("k", "v", "k_position") if getattr(a, name) is not None
    }
    return a._replace(**padded)


def scores(a: Arguments, wide: torch.dtype) -> Tensor:
    """[B, H, Lq, Lk] in dtype `wide`, -inf where a key is not visible."""
    Lq, Lk = a.q.shape[2], a.k.shape[2]
    score = a.q.to(wide) @ _per_query_head(a.k, a.q).to(wide).mT
    if a.query_vectors is not None:
        position = a.q if a.q_position is None else a.q_position
        score = score + _at_pairs(position.to(wide) @ a.query_vectors.to(wide).mT, Lk)
    if a.key_vectors is not None:
        position = _per_query_head(a.k if a.k_position is None else a.k_position, a.q)
        score = score + _at_pairs(position.to(wide).flip(-2) @ a.key_vectors.to(wide).mT, Lq).mT.flip(-1, -2)
    score = a.scale * score
    if a.table is not None:
        score = score + _at_pairs(a.table.to(wide)[:, None].expand(-1, Lq, -1), Lk)
    if a.bias is not None:
        score = score + a.bias.to(wide)
    if a.same is not None:
        score = score + a.same.to(wide)[..., None] * _equal(a.q_groups, a.k_groups)
    return score.masked_fill(~_visible(a), -torch.inf)


def values(p: Tensor, a: Arguments) -> Tensor:
    """Probabilities [B, H, Lq, Lk] → [B, H, Lq, D]: dropped out, then the weighted sum of values."""
    p = _dropped(p, a)
    out = p @ _per_query_head(a.v, a.q).to(p.dtype)
    if a.value_vectors is not None:
        out = out + _by_distance(p) @ a.value_vectors.to(p.dtype)
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


def _dropped(p: Tensor, a: Arguments) -> Tensor:
    if a.dropout == 0:
        return p
    return p * kept(p.shape, a.dropout, a.seed, p.device).to(p.dtype) / (1 - a.dropout)


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    """Repeat each key/value head for the group of query heads that share it (grouped-query attention)."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _per_key_head(x: Tensor, kv: Tensor) -> Tensor:
    """The way back for gradients: sum over each group."""
    return x.unflatten(1, (kv.shape[1], -1)).sum(2)


def _at_pairs(x: Tensor, Lk: int) -> Tensor:
    """[..., Lq, Lq + Lk - 1] → [..., Lq, Lk]: row i's entries for its keys, those at j - i + Lq - 1."""
    Lq = x.shape[-2]
    columns = torch.arange(Lk, device=x.device) - torch.arange(Lq, device=x.device)[:, None] + Lq - 1
    return x.gather(-1, columns.expand(*x.shape[:-1], Lk))


def _by_distance(x: Tensor) -> Tensor:
    """[..., Lq, Lk] → [..., Lq, Lq + Lk - 1]: the transpose of `_at_pairs`, zero at distances a row does not have.

    Padding every row by Lq and re-reading the buffer with rows one shorter shifts row i right by i: no scatter.
    """
    Lq, Lk = x.shape[-2:]
    width = Lq + Lk - 1
    padded = F.pad(x.flip(-2), (0, Lq)).flatten(-2)
    return padded[..., : Lq * width].unflatten(-1, (Lq, width)).flip(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


def _save(ctx, inputs, output):
    a = Arguments(*inputs)
    ctx.save_for_backward(*output, *a[: len(TENSORS)])
    ctx.numbers = a[len(TENSORS) :]
    ctx.set_materialize_grads(False)


@attention.gradient(save=_save)
def _(ctx, grad, grad_lse):
    out, *rest = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad.contiguous()
    wanted = list(ctx.needs_input_grad[: len(LEARNED)])
    grads = attention_backward(grad, grad_lse, out, *rest, *ctx.numbers, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *[None] * (
        len(Arguments._fields) - len(LEARNED)
    )

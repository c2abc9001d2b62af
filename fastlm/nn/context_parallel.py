"""Attention over a sequence that is divided among ranks: context parallelism."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm.masks import UNBOUNDED
from fastlm.nn import checks
from fastlm.nn.arguments import CommonOptions, arguments, turned, warn_of_later_keys
from fastlm.nn.blocks import Blocks, Call, Span, learned_by, pairs
from fastlm.nn.exchange import Exchange
from fastlm.positions import Position, Terms

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class Options(CommonOptions, total=False):
        """context_parallel_attention's, for the two signatures that type checkers see."""

        position: Position | None
        group: dist.ProcessGroup | None
        stretches: "Stretches | None"
        segments: Tensor | None


Stretches = Sequence[Sequence[tuple[int, int]]]
# what attention takes and a rank's part of it does not
REFUSED = {
    "bias": "an L×L tensor has no place on one rank; say it by a position, whose bias(distance) it is",
    "offset": "queries and keys are one sequence, and a rank's stand at the same places; leave it out",
}


@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = ..., **options: "Unpack[Options]"
) -> Tensor: ...
@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: "Unpack[Options]"
) -> tuple[Tensor, Tensor]: ...
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position: Position | None = None,
    group: "dist.ProcessGroup | None" = None,
    stretches: Stretches | None = None,
    return_lse: bool = False,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastlm.attention` of a sequence to itself, of which each rank of a group holds a part: context parallelism.

    Ranks meet one another's keys and values in turn, and each block is an ordinary call. Keys come straight from their
    rank while the block before is computed, and only where some query of a rank sees some of them by causal and window.
    Memory is that of a rank's own part and two others' keys and values, for every scheme, whatever the length of all.

    Args:
        query: [B, H, L, D], this rank's part of the sequence, of L tokens; L may differ from rank to rank.
        key: [B, Hk, L, D], of the same tokens.
        value: like key.
        position: a scheme of `fastlm.positions`, the same on every rank; it counts places in the whole sequence. What
            it learns gets this rank's part of its gradient, as every weight does, to be added up with theirs.
        group: the process group. None: all processes.
        stretches: of each rank, which tokens it holds: [(begin, end), ...], side by side in its tensors and together
            the sequence. None: one stretch each, in the order of ranks, whose lengths they ask of one another. Under
            causal, `zigzag` gives every rank the same to do.
        return_lse: whether to return log Σ exp(score) too.
        options: causal, window, prefix, segments, key_lengths, order, group_bias, dropout, seed, scale and softcap, as
            in `fastlm.attention`. What is [B, L] there is of this rank's tokens; key_lengths and prefix [B] are of the
            whole sequence. Ranks that give one seed drop what one process with it drops.

    Returns:
        [B, H, L, D] in query's dtype, of this rank's tokens; with return_lse a tuple of it and [B, H, L] fp32.

    Raises:
        ValueError, TypeError: as `fastlm.attention`; for a bias, an offset and a scheme's `Terms`; and for stretches
            that are not the sequence's, or not of this rank's length.

    Every rank of the group makes the call and its backward pass, in the same order as other collectives, with the same
    B, heads, D and dtype, and with gradients of the same arguments. Differentiable once. Blocks are weighted by their
    log-sum-exp, which is fp32: where all of a row's scores are large, out loses as many digits as it does.

    Liu et al. 2023, Ring Attention with Blockwise Transformers; Brandon et al. 2023, Striped Attention.
    """
    checks.no_tracing("context_parallel_attention")
    for name, cure in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"context_parallel_attention takes no {name}: {cure}")
    if unknown := options.keys() - {*checks.ARGUMENTS}:
        checks.unknown(*unknown)
    if isinstance(position, Terms):
        raise ValueError("position's terms are of one size, and blocks have others; give the scheme that made them")
    own = arguments(query, key, value, **options)
    if own.q.shape[2] != own.k.shape[2]:
        raise ValueError(
            f"query has {own.q.shape[2]} tokens and key {own.k.shape[2]}; a rank holds both of the same tokens"
        )
    if position is not None:
        checks.position(position)
        checks.terms(Terms(head_dim=position.head_dim), own.q.shape[1], own.q.shape[3], (0, 0, 0))
    spans = _spans(stretches, own.q, group)
    exchange = Exchange(group, [[bool(pairs(own, mine, theirs)) for theirs in spans] for mine in spans])
    q, k = own.q, own.k
    if position is not None:
        q, k = _turned(q, k, position, spans[exchange.rank])
        if position.causal and own.right > 0:
            warn_of_later_keys(stacklevel=3)
    call = Call(own, options.get("scale"), position, spans, exchange)
    out, lse = Blocks.apply(call, q, k, own.v, own.same, *learned_by(position, q))
    return (out, lse) if return_lse else out


def zigzag(length: int, world: int) -> list[list[tuple[int, int]]]:
    """Stretches of a causal sequence that give every rank the same to do: an early one and a late one each.

    Args:
        length: tokens of the sequence.
        world: number of ranks.

    Returns:
        For each rank two stretches of about length / (2 · world) tokens, the rank-th from the start and from the end.
    """
    ends = [i * length // (2 * world) for i in range(2 * world + 1)]
    stretch = lambda i: (ends[i], ends[i + 1])
    return [[stretch(rank), stretch(2 * world - 1 - rank)] for rank in range(world)]


def _turned(q: Tensor, k: Tensor, position: Position, spans: list[Span]) -> tuple[Tensor, Tensor]:
    """q and k turned by where they stand in the sequence."""
    places = torch.cat([torch.arange(span.begin, span.end, device=q.device) for span in spans])
    rotation = position.rotation(places, torch.promote_types(q.dtype, torch.float32))
    return (q, k) if rotation is None else tuple(turned(x, rotation, position.layout) for x in (q, k))


def _spans(stretches: Stretches | None, q: Tensor, group: "dist.ProcessGroup | None") -> list[list[Span]]:
    """Every rank's stretches, checked against this one's length."""
    rank, world, L = dist.get_rank(group), dist.get_world_size(group), q.shape[2]
    if stretches is None:
        mine = torch.tensor([L], device=q.device)
        lengths = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(lengths, mine, group=group)
        ends = [0, *accumulate(int(n) for n in lengths)]
        stretches = [[(ends[i], ends[i + 1])] for i in range(world)]
    else:
        _check_stretches(stretches, world, rank, L)
    return [_side_by_side(each) for each in stretches]


def _side_by_side(stretches: Sequence[tuple[int, int]]) -> list[Span]:
    ends = [0, *accumulate(end - begin for begin, end in stretches)]
    return [Span(*stretch, slice(ends[i], ends[i + 1])) for i, stretch in enumerate(stretches)]


def _check_stretches(stretches: Stretches, world: int, rank: int, L: int) -> None:
    if len(stretches) != world:
        raise ValueError(f"stretches are of {len(stretches)} ranks, and the group has {world}; give each rank's")
    in_order, at = sorted(stretch for each in stretches for stretch in each), 0
    for begin, end in in_order:
        if begin != at or end < begin:
            raise ValueError(
                f"stretches give [{begin}, {end}) where a stretch from {at} on is missing; together they are the "
                "sequence, every token once"
            )
        at = end
    if at >= UNBOUNDED:
        raise ValueError(f"the sequence has {at} tokens; served are fewer than 2³⁰")
    if (held := sum(end - begin for begin, end in stretches[rank])) != L:
        raise ValueError(f"stretches give rank {rank} {held} tokens, and its query has {L}; give it those tokens")

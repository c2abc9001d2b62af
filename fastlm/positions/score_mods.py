"""FlexAttention's way to say a bias, and ours: a score_mod that is a number by distance as a scheme, and back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlm.checks import whole
from fastlm.positions.base import Position

# (score, row of the batch, head, query, key), scalars → score, as torch.nn.attention.flex_attention takes it
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
SHIFTS = 8  # along the row, drawn anew for each distance


class ByScoreMod(Position):
    """The bias that a score_mod adds, at |distance| < length; made by `from_score_mod`."""

    def __init__(self, score_mod: ScoreMod, heads: int, length: int):
        super().__init__()
        self.score_mod, self.heads, self.length = score_mod, heads, length

    def bias(self, distance: Tensor) -> Tensor:
        """What it adds at each distance [n] int64 → [heads, n]; autograd reaches what the score_mod has learned."""
        return added(self.score_mod, self.heads, (-distance).clamp(min=0), distance.clamp(min=0))

    def terms(self, Lq: int, Lk: int, offset: int | None = None, device=None, dtype=torch.float32):
        """As every scheme's; raises ValueError for distances that were not looked at."""
        at = Lk - Lq if offset is None else offset
        if Lq and Lk and max(Lk - 1 - at, Lq - 1 + at) >= self.length:
            raise ValueError(
                f"the score_mod was looked at up to distance {self.length - 1}, and {Lq} queries from {at} on meet "
                f"{Lk} keys; give from_score_mod a longer length"
            )
        return super().terms(Lq, Lk, offset, device, dtype)


def from_score_mod(score_mod: ScoreMod, heads: int, length: int) -> Position:
    """A scheme that adds to scores what FlexAttention's score_mod does, where that is a number a head and distance.

    It is evaluated at every distance, from the first and the last query that have a key there and from some that are
    drawn; in two rows of a batch, and at two scores.

    Args:
        score_mod: (score, b, h, q_idx, kv_idx) → score, of scalar tensors. If it is a module its parameters are the
            scheme's; what else it has learned gets its gradients too.
        heads: number of heads; at least 1.
        length: of the longest sequence, in tokens; at least 1. Distances up to length - 1 are looked at.

    Returns:
        `Position`, for `fastlm.attention(position=...)`.

    Raises:
        ValueError: for one that does more than to add a finite number that depends on the head and kv_idx - q_idx
            alone, with what it depends on.

    Dong et al. 2024, FlexAttention.
    """
    whole(1, heads=heads, length=length)
    if not callable(score_mod):
        raise ValueError(f"score_mod is a {type(score_mod).__name__}; give a function of (score, b, h, q_idx, kv_idx)")
    held = score_mod.parameters() if isinstance(score_mod, nn.Module) else ()
    distance = torch.arange(1 - length, length, device=next((x.device for x in held), None))
    query, key = (-distance).clamp(min=0), distance.clamp(min=0)
    room = length - 1 - distance.abs()  # how far a pair can be moved along the row
    drawn = torch.rand(SHIFTS, len(room), generator=torch.Generator().manual_seed(0)).to(room.device)
    moves = [room, *((room + 1) * drawn).long()]
    with torch.no_grad():
        table = added(score_mod, heads, query, key)
        if not table.isfinite().all():
            raise ValueError(
                "score_mod gives scores that are not finite; say what is hidden by attention's own masks, such as "
                "causal=True"
            )
        for what, again in (
            ("the row of the batch", added(score_mod, heads, query, key, row=1)),
            ("the score", added(score_mod, heads, query, key, score=1.75)),
            *(("where the query stands", added(score_mod, heads, query + by, key + by)) for by in moves),
        ):
            if not torch.allclose(again, table, rtol=1e-4, atol=1e-5):
                raise ValueError(
                    f"score_mod depends on {what}; only a number by head and distance, kv_idx - q_idx, that is added "
                    "has a scheme; give attention's bias, or leave it to flex_attention"
                )
    return ByScoreMod(score_mod, heads, length)


def added(score_mod: ScoreMod, heads: int, query: Tensor, key: Tensor, row: int = 0, score: float = 0.0) -> Tensor:
    """What a score_mod adds to a score, for pairs of query [n] and key [n] → [heads, n]; mapped as FlexAttention maps
    it, so that it sees scalars.
    """
    start, b = torch.tensor(score, device=query.device), torch.tensor(row, device=query.device)
    of_pairs = torch.vmap(score_mod, in_dims=(None, None, None, 0, 0))
    of_heads = torch.vmap(of_pairs, in_dims=(None, None, 0, None, None))
    return of_heads(start, b, torch.arange(heads, device=query.device), query, key) - start


def to_score_mod(position: Position, Lq: int, Lk: int) -> ScoreMod:
    """FlexAttention's score_mod that adds what a scheme does, for Lq queries of which the last stands at the last of Lk
    keys.

    Args:
        position: a scheme that adds a number by distance, such as `ALiBi` or `T5Bias`.
        Lq: number of queries.
        Lk: number of keys.

    Returns:
        (score, b, h, q_idx, kv_idx) → score. It holds the scheme's table as it is now.

    Raises:
        ValueError: for a scheme that turns queries and keys, or has vectors that they meet.
    """
    made = position.terms(Lq, Lk)
    if made.rotate_q is not None or any(isinstance(x, Tensor) for x in made.vectors):
        raise ValueError(
            f"{type(position).__name__} changes queries or keys, which a score_mod does not see; give a scheme with a "
            "bias alone"
        )
    if made.table is None:
        return lambda score, b, h, q_idx, kv_idx: score
    table = made.table
    return lambda score, b, h, q_idx, kv_idx: score + table[h, kv_idx - q_idx + Lq - 1].to(score.dtype)

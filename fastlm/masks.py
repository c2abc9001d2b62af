"""Masks as functions of positions. Nothing here is ever an L×L tensor.

Query i of row b sees key j when all hold:

    -left ≤ d ≤ right, or j < prefix[b]    d = j - (i + offset), the signed distance from the query to the key
    j < key_lengths[b]                     keys past a row's length are padding
    segments[b, i] = segments[b, j]        documents packed into one row do not mix
    ranks[b, j] ≤ ranks[b, i]              a visiting order: a query sees what comes no later (XLNet's content stream)

Causal attention is the band with right = 0; a sliding window narrows both sides; no mask is the unbounded band. What is
not given holds everywhere, and a prefix nowhere.
"""

import torch
from torch import Tensor

UNBOUNDED = 2**30  # no position difference reaches it, and sums with positions stay inside int32


def band(causal: bool, window: tuple[int | None, int | None] | int | None) -> tuple[int, int]:
    """The visible band of keys around each query.

    Args:
        causal: whether right is at most 0.
        window: (left, right) in keys, None on a side for no bound; an int w for (w, w). None: no bound.

    Returns:
        (left, right), with UNBOUNDED for no bound.

    Raises:
        ValueError: for a window of another form, and for a negative bound.
    """
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    both = (window, window) if isinstance(window, int) else window
    if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(map(_is_bound, both)):
        raise ValueError(
            f"window is {window!r}; give (left, right) in keys, None for no bound on a side, or one int for both"
        )
    for side, bound in zip(("left", "right"), both, strict=True):
        if bound is not None and bound < 0:
            raise ValueError(f"window {side} bound is {bound}; give a count of keys ≥ 0, or None for no bound")
    left, right = (UNBOUNDED if bound is None else min(bound, UNBOUNDED) for bound in both)
    return left, 0 if causal else right


def _is_bound(x: object) -> bool:
    return x is None or (isinstance(x, int) and not isinstance(x, bool))


def segments_from_cu_seqlens(cu_seqlens: Tensor, L: int) -> Tensor:
    """The document that each position of a packed row belongs to, for `attention(segments=...)`.

    Args:
        cu_seqlens: [documents + 1] int; where each document starts and the last one ends, as flash-attn's varlen
            functions take it. What they take as [L, H, D] is x.transpose(0, 1)[None] here.
        L: length of the packed row.

    Returns:
        [1, L] int64, documents numbered from 0; `.expand(B, -1)` where B rows are packed alike. Positions after the
        last document are a segment of their own.

    Raises:
        ValueError: unless cu_seqlens is a vector of integers. On a CPU also unless they begin with 0, do not decrease
            and end within the row; elsewhere reading them would wait for the device.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}; give a tensor: torch.tensor(cu_seqlens)")
    if (
        cu_seqlens.ndim != 1
        or cu_seqlens.dtype == torch.bool
        or cu_seqlens.is_floating_point()
        or cu_seqlens.is_complex()
    ):
        raise ValueError(
            f"cu_seqlens must be [documents + 1] integers; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    starts = cu_seqlens.long()  # uint8 would count positions modulo 256
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        known = starts.tolist()
        if not known or known[0] != 0 or sorted(known) != known or known[-1] > L:
            raise ValueError(
                f"cu_seqlens must begin with 0, not decrease, and end within the row of {L}; got {known}. Give where "
                "documents start, and where the last one ends: [0, *lengths.cumsum(0)]"
            )
    return torch.searchsorted(starts, torch.arange(L, device=starts.device), right=True)[None] - 1


def ranks_from_cu_seqlens(cu_seqlens: Tensor, L: int) -> Tensor:
    """Positions in a packed row counted from the end of each document, for `attention(order=...)`.

    Causal attention, windows and schemes count along the row. That is right where queries and keys are packed alike.
    With flash-attn's varlen functions a document may have fewer queries than keys (cu_seqlens_q and cu_seqlens_k
    differ), and its last query stands at its last key. Say that by ranks, instead of causal=True:

        segments = segments_from_cu_seqlens(cu_seqlens_q, Lq), segments_from_cu_seqlens(cu_seqlens_k, Lk)
        order = ranks_from_cu_seqlens(cu_seqlens_q, Lq), ranks_from_cu_seqlens(cu_seqlens_k, Lk)
        attention(q, k, v, segments=segments, order=order)

    Of the schemes only those that turn queries and keys serve there, because ranks are positions: `fastlm.rotate(q,
    cos, sin)` with cos and sin of rope.angles(ranks[0].double()).

    Args:
        cu_seqlens: [documents + 1] int, as in `segments_from_cu_seqlens`.
        L: length of the packed row.

    Returns:
        [1, L] int64; -1 for the last token of each document, -2 for the one before.

    Raises:
        ValueError: as `segments_from_cu_seqlens`.
    """
    segments = segments_from_cu_seqlens(cu_seqlens, L)
    ends = torch.nn.functional.pad(cu_seqlens.long(), (0, 1), value=L)  # of what is before them, of each, of the rest
    return torch.arange(L, device=segments.device) - ends[segments + 1]


def padding(real: Tensor | None, Lq: int, segments: Tensor | None = None) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """The arguments of `fastlm.attention` that hide padded keys.

    Padding is a segment that no query belongs to. Queries that see nothing else, such as padding on the left, give
    zeros. Where reading values waits for nothing, padding on the right becomes lengths, which cost less.

    Args:
        real: [B, Lk] bool or int, which keys are no padding (others call it attention_mask); None for all.
        Lq: number of queries; they are the last Lq of the keys where segments are given.
        segments: [B, Lk] int, the packed document of each key; None for one a row.

    Returns:
        {"key_lengths": [B]}, {"segments": (of queries [B, Lq], of keys [B, Lk])}, or nothing where nothing is hidden.
    """
    if real is None:
        return {} if segments is None else {"segments": (segments[:, segments.shape[1] - Lq :], segments)}
    real = real.bool()
    if segments is None and real.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = real.sum(-1)
        if torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None]):
            return {} if real.all() else {"key_lengths": lengths}
    if segments is None:
        return {"segments": (real.new_ones(len(real), Lq, dtype=torch.int64), real.long())}
    return {"segments": (segments[:, segments.shape[1] - Lq :], padding_apart(segments, real))}


def padding_apart(segments: Tensor, real: Tensor) -> Tensor:
    """Segments [B, L] int → int64, in which padding, where real [B, L] bool is False, is a segment of its own."""
    segments = segments.long()  # 0 - 1 would be 255 in uint8, which may be another's
    return torch.where(real, segments, segments.min() - 1)


def position_ids(segments: Tensor) -> Tensor:
    """Positions that start over in each segment, for schemes that add to embeddings.

    Give them as scheme.embed(position_ids(segments)). Schemes that act on distances need none of this: inside a segment
    distances are right wherever it starts.

    Args:
        segments: [B, L] int; each segment's positions stand side by side.

    Returns:
        [B, L] int64.
    """
    positions = torch.arange(segments.shape[1], device=segments.device)
    starts = segments != segments.roll(1, -1)  # be it so for position 0 or not: 0 is what it would say
    return positions - torch.where(starts, positions, 0).cummax(-1).values

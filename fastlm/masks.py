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
    """(left, right) of the visible band.

    window: (left, right) in keys, None on a side for no bound; one int w for (w, w). Causal caps right at 0.
    Raises ValueError for anything else and for a negative bound.
    """
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    both = (window, window) if isinstance(window, int) else window
    is_bound = lambda x: x is None or (isinstance(x, int) and not isinstance(x, bool))
    if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(map(is_bound, both)):
        raise ValueError(
            f"window is {window!r}; give (left, right) in keys, None for no bound on a side, or one int for both"
        )
    for side, bound in zip(("left", "right"), both, strict=True):
        if bound is not None and bound < 0:
            raise ValueError(f"window {side} bound is {bound}; give a count of keys ≥ 0, or None for no bound")
    left, right = (UNBOUNDED if bound is None else min(bound, UNBOUNDED) for bound in both)
    return left, 0 if causal else right


def segments_of(cu_seqlens: Tensor, L: int) -> Tensor:
    """[1, L] int64: the number of the document that each position of a packed row belongs to, for
    `attention(segments=...)`; `.expand(B, -1)` where B rows are packed alike.

    cu_seqlens [documents + 1] int: where each document starts and the last one ends, as flash-attn's varlen functions
    take it; what they take as [L, H, D] is x.transpose(0, 1)[None] here. Positions after the last document are a
    segment of their own. Raises ValueError unless cu_seqlens is a vector of integers, and on a CPU, where reading
    values waits for nothing, unless they never decrease."""
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
    if starts.device.type == "cpu" and not torch.compiler.is_compiling() and (starts.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must not decrease; got {starts.tolist()}. Give where documents start: [0, *lengths.cumsum(0)]"
        )
    return torch.searchsorted(starts, torch.arange(L, device=starts.device), right=True)[None] - 1


def ranks_of(cu_seqlens: Tensor, L: int) -> Tensor:
    """[1, L] int64: positions in a packed row counted from the end of each document, -1 for its last token, for
    `attention(order=...)`.

    Causal attention, windows and schemes count along the row, which is right for documents whose queries and keys lie
    alike. Where a document's queries and keys differ in number, as in flash-attn's varlen functions with cu_seqlens_q
    and cu_seqlens_k, and its last query stands at its last key, say so by ranks, in place of causal=True:

        attention(q, k, v, segments=(segments_of(cu_seqlens_q, Lq), segments_of(cu_seqlens_k, Lk)),
                  order=(ranks_of(cu_seqlens_q, Lq), ranks_of(cu_seqlens_k, Lk)))

    Of schemes, those that turn queries and keys serve there, for ranks are positions: `fastlm.rotate(q, cos, sin)` with
    cos and sin of rope.angles(ranks[0].double()). Raises ValueError as `segments_of` does."""
    segments = segments_of(cu_seqlens, L)
    ends = torch.nn.functional.pad(cu_seqlens.long(), (0, 1), value=L)  # of what is before them, of each, of the rest
    return torch.arange(L, device=segments.device) - ends[segments + 1]


def positions_of(segments: Tensor) -> Tensor:
    """[B, L] int64: positions that start over in each segment, for schemes that add to embeddings:
    scheme.embed(positions_of(segments)).

    segments [B, L] int, the positions of each side by side. What acts on distances needs none of this: within a segment
    they are right wherever it starts.
    """
    positions = torch.arange(segments.shape[1], device=segments.device)
    starts = segments != segments.roll(1, -1)  # be it so for position 0 or not: 0 is what it would say
    return positions - torch.where(starts, positions, 0).cummax(-1).values

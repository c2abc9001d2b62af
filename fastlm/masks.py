"""Masks as functions of positions. Nothing here is ever an L×L tensor.

Key j is visible to query i when both hold:

    -left ≤ d ≤ right        d = j - (i + offset), the signed distance from the query to the key
    j < key_lengths[b]       keys past a row's length are padding

Causal attention is the band with right = 0; a sliding window narrows both sides; no mask is the unbounded band.
"""

UNBOUNDED = 2**30  # no position difference reaches it, and sums with positions stay inside int32


def band(causal: bool, window: tuple[int | None, int | None] | int | None) -> tuple[int, int]:
    """(left, right) of the visible band.

    window: (left, right) in keys, None on a side for no bound; one int w for (w, w). Causal caps right at 0.
    Raises ValueError for anything else and for a negative bound.
    """
    both = (window, window) if isinstance(window, int) else (window or (None, None))
    if isinstance(window, bool) or len(both) != 2 or not all(bound is None or isinstance(bound, int) for bound in both):
        raise ValueError(f"window is {window!r}; give (left, right) in keys, None for no bound on a side, or one int for both")
    for side, bound in zip(("left", "right"), both, strict=True):
        if bound is not None and bound < 0:
            raise ValueError(f"window {side} bound is {bound}; give a count of keys ≥ 0, or None for no bound")
    left, right = (UNBOUNDED if bound is None else min(bound, UNBOUNDED) for bound in both)
    return left, 0 if causal else right

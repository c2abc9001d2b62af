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
    Raises ValueError for a negative bound.
    """
    left, right = (window, window) if isinstance(window, int) else (window or (None, None))
    for side, bound in (("left", left), ("right", right)):
        if bound is not None and bound < 0:
            raise ValueError(f"window {side} bound is {bound}; give a count of keys ≥ 0, or None for no bound")
    left = UNBOUNDED if left is None else left
    right = UNBOUNDED if right is None else right
    return left, 0 if causal else right

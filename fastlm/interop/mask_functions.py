"""Which keys a mask function of transformers lets through, in the terms of `fastlm.attention`.

transformers says what is seen by a function of (row, head, query, key), which its other implementations call for every
pair. Here it is read instead: by which function of transformers.masking_utils it was made, and from what.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Pair = tuple[Tensor, Tensor]  # of queries [1|B, Lq], of keys [1|B, Lk]


class Seen(NamedTuple):
    """Arguments of `fastlm.attention`.

    left, right: how many keys are seen on either side of a query's own, None for all.
    segments: int, of queries and of keys; None where all are in one.
    """

    left: int | None = None
    right: int | None = None
    segments: Pair | None = None

    def both(self, other: "Seen") -> "Seen":
        """What is seen under either."""
        return Seen(
            _smaller(self.left, other.left),
            _smaller(self.right, other.right),
            self.segments if other.segments is None else _both(self.segments, other.segments),
        )


def read(function: Callable, positions: Callable[[], Pair]) -> Seen | None:
    """What is seen under a mask function; None where it is none of those that are known.

    positions: gives those of queries and keys, int64, from a row's start; few masks ask.
    """
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return Seen(right=0)
    if function is getattr(masking_utils, "bidirectional_mask_function", None):  # from 5.0 on
        return Seen()
    if function.__module__ != masking_utils.__name__:
        return None
    maker, given = function.__qualname__.split(".")[0], _made_from(function)
    if maker == "and_masks":
        seen = Seen()
        for each in given["mask_functions"]:
            part = read(each, positions)
            seen = None if seen is None or part is None else seen.both(part)
        return seen
    if maker == "sliding_window_overlay":
        return Seen(left=given["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return Seen(left=given["sliding_window"], right=given["sliding_window"])
    if maker == "chunked_overlay":
        starts = given["left_padding"][:, None]
        of_queries, of_keys = ((where - starts) // given["chunk_size"] for where in positions())
        return Seen(segments=(of_queries, of_keys))
    if maker == "packed_sequence_mask_function":
        documents = given["packed_sequence_mask"]
        return Seen(segments=(documents, documents))
    if maker == "remap_positions_for_packed_sequence":  # inside a document, distances are what they were
        return read(given["mask_function"], lambda: (given["position_ids"], given["position_ids"]))
    return None


def _made_from(function: Callable) -> dict[str, object]:
    """What a function took from where it was made, by name."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


# what torch.compiler.disable sets; itself it would import Dynamo with fastlm.interop, which takes longer than PyTorch
_made_from._torchdynamo_disable = True
_made_from._torchdynamo_disable_msg = (
    "a mask of more than causality is read from its function; leave out fullgraph=True"
)


def _smaller(x: int | None, y: int | None) -> int | None:
    return y if x is None else x if y is None else min(x, y)


def _both(one: Pair | None, other: Pair) -> Pair:
    """Segments of which each lies in one of both."""
    if one is None:
        return other
    low, high = other[1].min(), other[1].max()  # a query's segment is one of the keys'
    of_queries, of_keys = (x * (high - low + 1) + (y - low) for x, y in zip(one, other, strict=True))
    return of_queries, of_keys

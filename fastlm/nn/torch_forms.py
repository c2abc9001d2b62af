"""What torch's attention takes, in the forms of fastlm's: masks of each pair, widths, dimensions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import masks


def mask_arguments(mask: Tensor, B: int, Lq: int) -> dict[str, object]:
    """The arguments of `fastlm.attention` that say what a mask says.

    Args:
        mask: [1|B, 1|H, 1|Lq, Lk], bool, True for visible pairs, or floats that are added to scores.
        B: rows of the batch.
        Lq: number of queries.

    Returns:
        Padding, where the mask tells keys alone and can be read without waiting; else {"bias": ...}, as large as the
        mask.
    """
    for dim in range(3):  # what was expanded is one
        mask = mask.narrow(dim, 0, 1) if mask.shape[dim] > 1 and mask.stride(dim) == 0 else mask
    is_bool, readable = mask.dtype == torch.bool, mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if mask.shape[1:3] == (1, 1) and readable and not mask.requires_grad:
        real = mask if is_bool else mask == 0
        if is_bool or bool((real | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return masks.padding(real[:, 0, 0].expand(B, -1), Lq)
    return {"bias": torch.where(mask, 0.0, -torch.inf) if is_bool else mask}


def of_one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Heads of one size, by channels of zeros, and how many of value's are its own."""
    D, width = query.shape[-1], value.shape[-1]
    if width < D:
        return query, key, F.pad(value, (0, D - width)), width
    more = (0, width - D)
    return (F.pad(query, more), F.pad(key, more), value, width) if width > D else (query, key, value, width)


def of_four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], tuple[int, ...]]:
    """query [..., H, Lq, D], key [..., Hk, Lk, D], value [..., Hk, Lk, Dv] and mask, whose first dimensions broadcast,
    as [B, H, L, D] and [1|B, 1|H, 1|Lq, Lk]; and the first dimensions of what comes out.

    grouped: whether H may be any multiple of Hk.

    Raises:
        ValueError: for dimensions that do not broadcast.
    """
    lead = [(1,) * (4 - x.ndim) + tuple(x.shape[:-2]) for x in (query, key, value)]
    try:
        rows = torch.broadcast_shapes(*(shape[:-1] for shape in lead))
        heads = lead[0][-1] if grouped else torch.broadcast_shapes(*(shape[-1:] for shape in lead))[0]
        of_keys = torch.broadcast_shapes(*(shape[-1:] for shape in lead[1:]))[0]
        if mask is not None:
            shape = torch.broadcast_shapes(mask.shape, (*rows, heads, query.shape[-2], key.shape[-2]))
            if shape != (*rows, heads, query.shape[-2], key.shape[-2]):
                raise RuntimeError(f"attn_mask is {list(mask.shape)}")
    except RuntimeError as error:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)} and attn_mask "
            f"{None if mask is None else list(mask.shape)} do not broadcast: {error}; give [..., H, L, D] with as many "
            "heads or one, and enable_gqa=True for other numbers of them"
        ) from None
    B = math.prod(rows)
    whole = lambda x, n: x.expand(*rows, n, *x.shape[-2:]).reshape(B, n, *x.shape[-2:])
    made = whole(query, heads), whole(key, of_keys), whole(value, of_keys)
    if mask is not None:
        mask = mask.view((1,) * (len(rows) + 3 - mask.ndim) + tuple(mask.shape)) if mask.ndim < len(rows) + 3 else mask
        if len(rows) > 1:
            mask = mask.expand(*rows, *mask.shape[-3:]).flatten(0, len(rows) - 1)
    dimensions = max(x.ndim for x in (query, key, value)) - 2
    return (*made, mask), (*rows, heads)[len(rows) + 1 - dimensions :]

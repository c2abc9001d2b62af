"""The functions people call: checked arguments, positions and masks turned into an op's plain numbers and vectors."""

import torch
from torch import Tensor

from fastlm import masks
from fastlm.ops.attention import attention as attention_op
from fastlm.ops.rotary import LAYOUTS
from fastlm.ops.rotary import rotate as rotate_op
from fastlm.positions import Position, Terms


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position: Position | Terms | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | int | None = None,
    segments: Tensor | None = None,
    key_lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
    offset: int | None = None,
) -> Tensor:
    """Attention with any positional scheme: [B, H, Lq, D] in query's dtype.

    query [B, H, Lq, D]; key, value [B, Hk, Lk, D] with H a multiple of Hk (grouped-query attention); fp32, bf16 or fp16.
    position: a scheme of `fastlm.positions`, or its `Terms` made once for all layers. causal: key j is visible to
    query i when j ≤ i + offset. window: (left, right) keys around the query, None for no bound. key_lengths [B] int: keys
    past a row's length are padding. scale: 1/√D unless given. offset: the first query's position, Lk - Lq unless given,
    so that the last query stands at the last key and a decoding step needs no argument. Queries that see no key give zeros.
    bias, segments, dropout and seed are part of the interface and not served yet.

    Raises ValueError for shapes, dtypes or devices that do not fit, NotImplementedError for what is not served yet.
    """
    for name, asked in (("bias", bias is not None), ("segments", segments is not None), ("dropout", dropout != 0), ("seed", seed is not None)):
        if asked:
            raise NotImplementedError(f"fastlm.attention does not serve {name}= yet; torch's scaled_dot_product_attention takes a dense mask and dropout_p")
    query, key, value = _autocast(query, key, value)
    _check_attention(query, key, value, key_lengths)
    Lq, Lk, D = query.shape[2], key.shape[2], query.shape[3]
    offset = Lk - Lq if offset is None else offset
    scale = D**-0.5 if scale is None else scale
    terms = _terms(position, Lq, Lk, offset, query.device)
    _check_table(terms.table, query.shape[1], Lq, Lk)
    if terms.rotate_q is not None:
        query = rotate(query, *terms.rotate_q, layout=terms.layout)
        key = rotate(key, *terms.rotate_k, layout=terms.layout)
    left, right = masks.band(causal, window)
    out, _ = attention_op(query, key, value, terms.table, key_lengths, left, right, scale, offset)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "half") -> Tensor:
    """Turn pairs of channels of x [B, H, L, D] by the angles whose cos and sin are given, [L, R/2] or [B, L, R/2] fp32.

    layout: "half" pairs channel i with i + R/2, "interleaved" pairs 2i with 2i + 1; channels from R on pass through.
    Raises ValueError when shapes do not fit. Su et al. 2021, eq. 34.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose from {', '.join(LAYOUTS)}")
    if x.ndim != 4 or cos.shape != sin.shape or cos.ndim not in (2, 3) or cos.shape[-2] != x.shape[2]:
        raise ValueError(f"rotate takes x [B, H, L, D] and cos, sin [L, R/2] or [B, L, R/2]; got x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}")
    if cos.ndim == 3 and cos.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows in its batch, cos and sin have {cos.shape[0]}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"cos and sin turn {2 * cos.shape[-1]} channels, but x has {x.shape[-1]}")
    return rotate_op(x, cos, sin, layout)


def _terms(position: Position | Terms | None, Lq: int, Lk: int, offset: int, device: torch.device) -> Terms:
    if not isinstance(position, Position):
        return position or Terms()
    if position.embeds:
        raise ValueError(f"position {position.name!r} adds to token embeddings, which attention does not see: add position.embed(...) there, and pass none here")
    return position.terms(Lq, Lk, offset, device)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where autocast is on, as torch's own attention does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> None:
    shapes = f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention takes query [B, H, Lq, D] and key, value [B, Hk, Lk, D]; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"query, key and value must share one of fp32, bf16, fp16 (fp64 for the reference); got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"query, key and value must be on one device; got {q.device}, {k.device}, {v.device}")
    if key_lengths is not None and (key_lengths.shape != q.shape[:1] or key_lengths.is_floating_point()):
        raise ValueError(f"key_lengths must be [{q.shape[0]}] integers; got {list(key_lengths.shape)} {key_lengths.dtype}")


def _check_table(table: Tensor | None, heads: int, Lq: int, Lk: int) -> None:
    if table is not None and table.shape != (heads, Lq + Lk - 1):
        raise ValueError(f"the position's table must be [heads, Lq + Lk - 1] = [{heads}, {Lq + Lk - 1}]; got {list(table.shape)}")

"""What attention and rotate may be given: tensors that fit each other, numbers, and what schemes and masks made.

Each check says what was given and what to give instead, in a ValueError; no check waits for a device.
"""

from typing import NoReturn

import torch
from torch import Tensor

from fastlm import masks
from fastlm.backends.eager import transformed
from fastlm.checks import did_you_mean, finite
from fastlm.ops.rotary import LAYOUTS
from fastlm.positions import Position, Terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MASK = "causal, window, prefix, key_lengths, segments or order, or bias=torch.where(mask, 0.0, -torch.inf)"
_DOCUMENTS = (
    "segments=(of queries, of keys) by fastlm.masks.segments_from_cu_seqlens, "
    "and for causal, order by masks.ranks_from_cu_seqlens"
)
ELSEWHERE = {  # what other libraries call an argument → what fastlm.attention takes in its place
    "attn_mask": _MASK,
    "attention_mask": _MASK,
    "mask": _MASK,
    "block_mask": _MASK,
    "key_padding_mask": "key_lengths [B], how many keys each row has, where padding is on the right",
    "is_causal": "causal",
    "dropout_p": "dropout",
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "scaling": "scale",
    "enable_gqa": "nothing: fewer heads of key and value than of query are enough",
    "window_size": "window=(left, right), with None for no bound where others write -1",
    "sliding_window": "window=(sliding_window - 1, 0)",
    "alibi_slopes": "position=fastlm.positions.ALiBi(heads)",
    "score_mod": "position, a fastlm.positions.Position whose bias(distance) it is, bias, or softcap",
    "cu_seqlens": "segments=fastlm.masks.segments_from_cu_seqlens(cu_seqlens, L)",
    "cu_seqlens_q": _DOCUMENTS,
    "cu_seqlens_k": _DOCUMENTS,
    "max_seqlen_q": _DOCUMENTS,
    "max_seqlen_k": _DOCUMENTS,
    "logits_soft_cap": "softcap",
    "attn_logit_softcapping": "softcap",
    "return_attn_probs": "return_lse=True, of which probabilities are exp(score - lse)",
    "deterministic": "nothing: gradients are, on every backend",
}
ARGUMENTS = (
    "query", "key", "value", "position", "bias", "causal", "window", "prefix", "segments", "key_lengths", "order",
    "group_bias", "dropout", "seed", "scale", "softcap", "offset", "return_lse",
)  # fmt: skip


def unknown(name: str, *others: str) -> NoReturn:
    """Raise TypeError, as Python does, for an argument that attention does not have."""
    cure = ELSEWHERE.get(name)
    hint = f"; give {cure}" if cure else did_you_mean(name, ARGUMENTS) or f"; it takes {', '.join(ARGUMENTS)}"
    raise TypeError(f"attention takes no {name}{hint}")


def no_tracing(name: str) -> None:
    if torch.jit.is_tracing():
        raise ValueError(
            f"torch.jit.trace would keep one call's lengths and positions of fastlm.{name} for every call; "
            "use torch.compile or torch.export"
        )


def tensors(**values: object) -> None:
    for name, x in values.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is of type {type(x).__name__}; give a tensor, torch.as_tensor({name})")
        if x.layout != torch.strided:
            raise ValueError(f"{name} is sparse ({x.layout}); give a dense tensor, {name}.to_dense()")


def heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    of_q, of_k = q.shape, k.shape
    if len(of_q) != 4 or len(of_k) != 4 or of_k != v.shape or of_q[0] != of_k[0] or of_q[3] != of_k[3]:
        three = "; of three dimensions, make rows of one head by x[:, None], or heads of one row by x[None]"
        cure = three if 3 in (q.ndim, k.ndim, v.ndim) else ""
        raise ValueError(
            f"attention takes query [B, H, Lq, D] and key, value [B, Hk, Lk, D]; got {_shapes(q, k, v)}{cure}"
        )
    if of_q[3] == 0:
        raise ValueError(f"the head dimension is 0; got {_shapes(q, k, v)}")
    if of_k[1] == 0 or of_q[1] % of_k[1]:
        raise ValueError(f"query heads must be a multiple of key heads; got {_shapes(q, k, v)}")
    dtype = q.dtype
    if not (dtype == k.dtype == v.dtype) or dtype not in DTYPES:
        raise ValueError(
            "query, key and value must share one of fp32, bf16, fp16 (fp64 for the reference); "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(f"query, key and value must be on one device; got {q.device}, {k.device}, {v.device}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}"


def numbers(
    scale: float | None, softcap: float | None, dropout: float, seed: int | None, offset: int, length: int
) -> None:
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is not None and not isinstance(x, torch.SymFloat) and not (finite(x) and x > 0):
            cure = "; to learn it, multiply query by it" if name == "scale" and isinstance(x, Tensor) else ""
            raise ValueError(f"{name} is {x!r}; it must be a positive, finite number{cure}")
    if dropout != 0 and not (finite(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout!r}; it must be a number in [0, 1)")
    if seed is not None and not (_is_int(seed) and 0 <= seed < 2**63):
        raise ValueError(f"seed is {seed!r}; it must be an int in [0, 2⁶³)")
    if not _is_int(offset) or abs(offset) + length >= masks.UNBOUNDED:
        raise ValueError(f"offset is {offset!r}; it must be an int, and stay with all positions below 2³⁰")


def _is_int(x: object) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def members(name: str, value: tuple | None, *what: str) -> tuple:
    """The members of an argument that is a tuple, or as many None."""
    if value is None:
        return (None,) * len(what)
    if not isinstance(value, (tuple, list)) or len(value) != len(what) or not all(isinstance(x, Tensor) for x in value):
        got = [type(x).__name__ for x in value] if isinstance(value, (tuple, list)) else type(value).__name__
        raise ValueError(f"{name} must be a tuple of tensors ({', '.join(what)}); got {got}")
    return tuple(value)


def integers(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is None:
        return
    tensors(**{name: x})
    if x.shape != shape or x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
        cure = ", so .expand it" if x.ndim == 2 and x.shape[0] == 1 and x.shape[1:] == shape[1:] else ""
        raise ValueError(f"{name} must be {list(shape)} integers; got {list(x.shape)} {x.dtype}{cure}")


def packed_alike(of_queries: Tensor, of_keys: Tensor) -> None:
    """That no query stands at a key of another document, where the last query stands at the last key and a document is
    a segment that has queries and keys. Of segments whose values can be read without waiting, on a CPU.
    """
    if not all(type(x) is Tensor and x.device.type == "cpu" for x in (of_queries, of_keys)):
        return
    if torch.compiler.is_compiling() or transformed():
        return
    n = min(of_queries.shape[1], of_keys.shape[1])
    last, own = (x[:, x.shape[1] - n :] for x in (of_queries, of_keys))
    if last.dtype == own.dtype and torch.equal(last, own):
        return
    has_keys, has_queries = _in_same_row(last, of_keys), _in_same_row(own, of_queries)
    astray = has_keys & has_queries & (last != own)
    if astray.any():
        row = int(astray.any(1).nonzero()[0])
        raise ValueError(
            f"segments of queries and keys are packed apart in row {row}, and causal, window and position count along "
            "the row; in their place give order=(masks.ranks_from_cu_seqlens(cu_seqlens_q, Lq), "
            "masks.ranks_from_cu_seqlens(cu_seqlens_k, Lk))"
        )


def _in_same_row(documents: Tensor, others: Tensor) -> Tensor:
    """Which of documents [B, n] are among the others [B, m] of their row."""
    B = len(documents)
    rows = torch.arange(B, device=documents.device)[:, None]
    return torch.isin(documents.long() * B + rows, others.long() * B + rows)


def group_bias(same: Tensor | None, shape: tuple[int, int, int]) -> None:
    if same is not None and (same.shape != shape or not same.is_floating_point()):
        raise ValueError(
            f"group_bias must begin with [B, H, Lq] = {list(shape)} of floats; got {list(same.shape)} {same.dtype}"
        )


def bias(value: Tensor | None, full: tuple[int, ...]) -> None:
    if value is None:
        return
    tensors(bias=value)
    if value.ndim != 4 or any(n not in (1, whole) for n, whole in zip(value.shape, full, strict=True)):
        raise ValueError(f"bias must be [B, H, Lq, Lk] = {list(full)}, each 1 to broadcast; got {list(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(
            f"bias is {value.dtype}, and it is added to scores; "
            "make a mask a bias by torch.where(mask, 0.0, -torch.inf)"
        )


def position(given: object) -> None:
    """That it is a scheme, which acts in attention."""
    if not isinstance(given, Position):
        what = repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
        raise ValueError(f"position is {what}; give a scheme, such as fastlm.positions.ALiBi(heads), or its terms")
    if given.embeds():
        raise ValueError(
            f"position {given.name!r} adds to token embeddings, which attention does not see: "
            "add position.embed(...) there, and pass none here"
        )


def terms(made: Terms, H: int, D: int, size: tuple[int, int, int]) -> None:
    """That a scheme's terms are for these calls. size: (Lq, Lk, offset)."""
    if made.size is not None and made.size != size:
        mine, theirs = (", ".join(map(str, sizes)) for sizes in (size, made.size))
        raise ValueError(
            f"position's terms were made for Lq, Lk, offset = {theirs}, and this call has {mine}; "
            f"make them by position.terms({mine})"
        )
    if made.head_dim is not None and made.head_dim != D:
        raise ValueError(
            f"position turns heads of {made.head_dim} channels, and query's have {D}; make it for head_dim {D}, "
            "of which a fraction may turn"
        )
    for name, turn in (("rotate_q", made.rotate_q), ("rotate_k", made.rotate_k)):
        if turn is not None and not (isinstance(turn, tuple) and len(turn) == 2):
            raise ValueError(f"the position's {name} is of type {type(turn).__name__}; give (cos, sin), or None")
    n, vectors = size[0] + size[1] - 1, made.vectors
    _term("table", made.table, "[heads, Lq + Lk - 1]", (H, n))
    given = {name: getattr(vectors, name) for name in ("query_vectors", "key_vectors", "value_vectors")}
    what = "Lq + Lk - 1"
    if vectors.buckets is not None:
        integers("the position's buckets", vectors.buckets, (n,))
        what, n = "buckets", next((x.shape[1] for x in given.values() if x is not None and x.ndim == 3), n)
    for name, x in given.items():
        _term(name, x, f"[heads, {what}, D]", (H, n, D))
    for name in ("content_bias", "position_bias"):
        _term(name, getattr(vectors, name), "[heads, D]", (H, D))


def _term(name: str, x: Tensor | None, what: str, shape: tuple[int, ...]) -> None:
    if x is not None and x.shape != shape:
        raise ValueError(f"the position's {name} must be {what} = {list(shape)}; got {list(x.shape)}")


def rows(given: Tensor, x: Tensor, order: tuple[Tensor, Tensor] | None) -> None:
    """That a layer's rows say where those of x [B, P, dim] stand."""
    if order is None:
        raise ValueError("rows say where queries stand among those of order; give order=(of queries, of keys)")
    if given.shape != x.shape[:2]:
        raise ValueError(f"rows must be {list(x.shape[:2])}, a place for each of x's rows; got {list(given.shape)}")


def rotation(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    tensors(x=x, cos=cos, sin=sin)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose from {', '.join(LAYOUTS)}")
    for name, floats in (("x", x), ("cos", cos), ("sin", sin)):
        if not floats.is_floating_point():
            raise ValueError(f"{name} is {floats.dtype}, and channels turn by fractions; give floats")
    if x.ndim != 4 or cos.shape != sin.shape or cos.ndim not in (2, 3) or cos.shape[-2] != x.shape[2]:
        raise ValueError(
            "rotate takes x [B, H, L, D] and cos, sin [L, R/2] or [B, L, R/2]; "
            f"got x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
        )
    if cos.ndim == 3 and cos.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows in its batch, cos and sin have {cos.shape[0]}")
    if not 0 < 2 * cos.shape[-1] <= x.shape[-1]:
        raise ValueError(f"cos and sin turn {2 * cos.shape[-1]} channels, but x has {x.shape[-1]}")


def devices(first: Tensor, **others: Tensor | tuple | None) -> None:
    for name, value in others.items():
        if value is None:
            continue
        for x in value if isinstance(value, tuple) else (value,):
            if x is not None and x.device != first.device:
                raise ValueError(f"{name} is on {x.device} and query or x on {first.device}; move it there")

"""What launchers share: the op's arguments as pointers and numbers that kernels take, and the machine they run on.

`a` is the op's arguments by name everywhere, fastlm.ops.attention.Arguments.
"""

from typing import Any, NamedTuple, get_type_hints

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from fastlm.backends.philox import threshold
from fastlm.kernels.terms import Bias, Floats, Integers, Numbers, Table, TermPointers, Vectors
from fastlm.kernels.tile import INTERPRETED, Rows
from fastlm.kernels.tiles import LARGEST, Tiles, cdiv, tiles

# name → kind of what kernels are given
KINDS = get_type_hints(TermPointers, include_extras=True)
VECTORS = tuple(name for name, kind in KINDS.items() if kind == Vectors)
CAPPED = ("table", "key_lengths")  # what the cap has room for
MOST_READY = 4096  # launches remembered
_ready: dict[tuple, Any] = {}  # what a launch is known by → the compiled kernel


class Saved(NamedTuple):
    """What the gradients' first kernels leave to the others: lse in its unit and δ are [B, H, Lq] fp32."""

    q: Rows
    k: Rows
    v: Rows
    grad: Rows
    lse: Tensor
    delta: Tensor


def tiles_for(kernel: str, a: tuple) -> Tiles:
    """The kernel's tiles: square ones of their own where rows by distance are met; without plain attention's cap on
    registers where terms need more.
    """
    if any(getattr(a, name) is not None for name in VECTORS):
        kernel = {"table": "vector_sums", "bias": "bias"}.get(kernel, "vectors")
    elif kernel == "forward" and a.bias is not None and 1 not in a.bias.shape[2:]:
        kernel = "forward_bias"
    found = tiles(kernel, a.q.shape[3], a.q.dtype, architecture())
    if kernel != "forward" or found.maxnreg is None:
        return found
    plain = not (a.dropout or a.softcap) and all(getattr(a, name, None) is None for name in KINDS if name not in CAPPED)
    return found if plain else found._replace(maxnreg=None)


def rows(x: Tensor) -> Tensor:
    """x [B, H, L, D] itself if a kernel can read it in place: channels adjacent, a tile's rows within 32-bit reach."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**22 else x.contiguous()


def strided(x: Tensor) -> Rows:
    """x [B, H, L, D] as kernels take it."""
    x = rows(x)
    return Rows(x, x.stride()[:3])


def bias(x: Tensor) -> Bias:
    """x [1|B, 1|H, 1|Lq, 1|Lk] as kernels take it."""
    strides = tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Bias(x, strides, *(tl.constexpr(size != 1) for size in x.shape[2:]))


def terms(a: tuple) -> TermPointers:
    """The call's terms and masks as kernels read them; without bounds, which depend on the tiles."""
    given = {name: layout(x, a) for name, layout in LAYOUTS.items() if (x := getattr(a, name)) is not None}
    return NO_TERMS._replace(**given) if given else NO_TERMS


def with_bounds(t: TermPointers, tiles: Tiles) -> TermPointers:
    """The terms with each tile's least and largest segment, where there are segments."""
    if t.q_segments is None:
        return t
    return t._replace(q_bounds=_bounds(t.q_segments, tiles.BLOCK_M), k_bounds=_bounds(t.k_segments, tiles.BLOCK_N))


def numbers(a: tuple) -> Numbers:
    """The call's numbers, which kernels take one by one."""
    (_, H, Lq, _), (Hk, Lk) = a.q.shape, a.k.shape[1:3]
    seed, limit = (a.seed, threshold(a.dropout)) if a.dropout else (0, None)
    return Numbers(
        H=H, group=H // Hk, Lq=Lq, Lk=Lk, table_stride=Lq + Lk - 1 + 2 * _margin(a), left=a.left, right=a.right,
        offset=a.offset, scale=a.scale, softcap=None if a.softcap is None else float(a.softcap), seed=seed,
        q0=a.first_query, k0=a.first_key, threshold=limit, dropout_scale=1 / (1 - a.dropout),
    )  # fmt: skip


def signature(a: tuple, *others: Tensor | None) -> tuple:
    """All of a call that Triton looks at when it chooses among the compilations of a kernel, and more: dtypes, shapes,
    strides and alignment of its tensors and of others that launches are given, and its numbers, of the seed its size.
    """
    return looks(*a._replace(seed=a.seed < 2**31), *others)


def looks(*values: Any) -> tuple:
    """The values, of tensors what `signature` says."""
    return tuple((x.dtype, x.shape, x.stride(), x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in values)


def launch(kernel: Any, programs: int, chosen: Tiles, seen: tuple, *args) -> None:
    """kernel[(programs,)](*args) with the tiles' options.

    Triton's launcher looks at each of some fifty values in every call, which takes longer than all the rest; a call
    whose `signature` was seen goes straight to the kernel that was compiled for it.
    """
    key = None if INTERPRETED else (id(kernel), driver.active.get_current_device(), chosen, seen)
    compiled = _ready.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*args)
        return
    compiled = kernel[(programs,)](*args, **chosen.options)
    if compiled is not None:
        if len(_ready) >= MOST_READY:
            _ready.clear()
        _ready[key] = compiled


def architecture() -> int:
    """The compute capability kernels will run on, such as 90; the interpreter takes the tiles of 90."""
    return 90 if INTERPRETED else driver.active.get_current_target().arch


def _margin(a: tuple) -> int:
    """How far tiles that hang over the end may read past both ends of a row of the table; 0 where none does."""
    return 0 if a.q.shape[2] % LARGEST == 0 and a.k.shape[2] % LARGEST == 0 else LARGEST


def _with_margins(table: Tensor, margin: int) -> Tensor:
    """table [H, Lq + Lk - 1] with so many elements before and after each row, which hold the score of no query or key.

    Rows lie Numbers.table_stride apart. Only where tiles do hang over does this make a copy.
    """
    return torch.nn.functional.pad(table, (margin, margin))[:, margin:] if margin else table.contiguous()


def _bounds(segments: Tensor, block: int) -> Tensor:
    """segments [B, L] → [B, 2, tiles]: the least and the largest of each tile, the last one filled up with its last."""
    tiles = cdiv(segments.shape[1], block)
    missing = tiles * block - segments.shape[1]
    whole = torch.cat((segments, segments[:, -1:].expand(-1, missing)), 1) if missing else segments
    return torch.stack(whole.unflatten(1, (tiles, block)).aminmax(dim=2), 1)


_LAYOUT_OF = {
    Rows: lambda x, a: strided(x.to(a.q.dtype)),
    Vectors: lambda x, a: x.to(a.q.dtype).contiguous(),
    Integers: lambda x, a: (x if x.dtype in (torch.int32, torch.int64) else x.int()).contiguous(),
    Table: lambda x, a: _with_margins(x.float(), _margin(a)),
    Bias: lambda x, a: bias(x),
    Floats: lambda x, a: x.float().contiguous(),
}
# name of what is given with a call → how kernels are given it
LAYOUTS = {name: _LAYOUT_OF[kind] for name, kind in KINDS.items() if kind in _LAYOUT_OF}
NO_TERMS = TermPointers(*[None] * len(KINDS))

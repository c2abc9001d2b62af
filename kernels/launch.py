"""What launchers share: the op's arguments as pointers and numbers that kernels take, and the machine they run on.

`a` is the op's arguments by name everywhere, fastlm.ops.attention.Arguments.
"""

from typing import NamedTuple, get_type_hints

import torch
import triton
from torch import Tensor

from fastlm.backends.philox import threshold
from fastlm.kernels.terms import Bias, Floats, Integers, Numbers, Table, TermPointers, Vectors
from fastlm.kernels.tile import INTERPRETED, Rows
from fastlm.kernels.tiles import LARGEST, Tiles, tiles

# name → kind of what kernels are given
KINDS = get_type_hints(TermPointers, include_extras=True)
VECTORS = tuple(name for name, kind in KINDS.items() if kind == Vectors)


class Saved(NamedTuple):
    """What the gradients' first kernels leave to the others: lse in its unit and δ are [B, H, Lq] fp32."""

    q: Rows
    k: Rows
    v: Rows
    grad: Tensor
    lse: Tensor
    delta: Tensor


def tiles_for(kernel: str, a: tuple) -> Tiles:
    """The kernel's tiles: square ones of their own where rows by distance are met; without plain attention's cap on
    registers where terms need more.
    """
    given = {name for name, x in a._asdict().items() if isinstance(x, Tensor)}
    if given & set(VECTORS):
        kernel = {"table": "vector_sums", "bias": "bias"}.get(kernel, "vectors")
    elif kernel == "forward" and a.bias is not None:
        kernel = "forward_bias"
    found = tiles(kernel, a.q.shape[3], a.q.dtype, architecture())
    plain = given <= {"q", "k", "v", "table", "key_lengths"} and not a.dropout
    return found if plain or kernel != "forward" else found._replace(maxnreg=None)


def rows(x: Tensor) -> Tensor:
    """x [B, H, L, D] itself if a kernel can read it in place: channels adjacent, a tile's rows within 32-bit reach."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**22 else x.contiguous()


def strided(x: Tensor) -> Rows:
    """x [B, H, L, D] as kernels take it."""
    x = rows(x)
    return Rows(x, x.stride()[:3])


def terms(a: tuple) -> TermPointers:
    """The call's terms and masks as kernels read them; without bounds, which depend on the tiles."""
    layouts = {
        Rows: lambda x: strided(x.to(a.q.dtype)),
        Vectors: lambda x: x.to(a.q.dtype).contiguous(),
        Integers: lambda x: (x if x.dtype in (torch.int32, torch.int64) else x.int()).contiguous(),
        Table: lambda x: _with_margins(x.float(), _margin(a)),
        Bias: lambda x: Rows(x, broadcast_strides(x)),
        Floats: lambda x: x.float().contiguous(),
    }
    given = {name: getattr(a, name, None) for name in KINDS}
    return TermPointers(**{name: None if x is None else layouts[KINDS[name]](x) for name, x in given.items()})


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
        offset=a.offset, scale=a.scale, seed=seed, threshold=limit, dropout_scale=1 / (1 - a.dropout),
    )  # fmt: skip


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """x's strides, 0 where it has one element for all."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def architecture() -> int:
    """The compute capability kernels will run on, such as 90; the interpreter takes the tiles of 90."""
    return 90 if INTERPRETED.value else triton.runtime.driver.active.get_current_target().arch


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
    tiles = triton.cdiv(segments.shape[1], block)
    missing = tiles * block - segments.shape[1]
    whole = torch.cat((segments, segments[:, -1:].expand(-1, missing)), 1) if missing else segments
    return torch.stack(whole.unflatten(1, (tiles, block)).aminmax(dim=2), 1)

"""What launchers share: the op's arguments as pointers and numbers that kernels take, and the machine they run on.

`a` is the op's arguments by name everywhere, fastlm.ops.attention.Arguments.
"""

import torch
import triton
from torch import Tensor

from fastlm.backends.philox import threshold
from fastlm.kernels.terms import Terms
from fastlm.kernels.tile import INTERPRETED
from fastlm.kernels.tiles import LARGEST, Tiles, tiles

VECTORS = ("query_vectors", "key_vectors", "value_vectors")
INTEGERS = ("q_groups", "k_groups", "key_lengths", "prefix", "q_segments", "k_segments", "q_ranks", "k_ranks")


def tiles_for(kernel: str, a: tuple) -> Tiles:
    """The kernel's tiles: square ones of their own where rows by distance are met; without plain attention's cap on
    registers where terms need more."""
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


def terms(a: tuple) -> Terms:
    """The call's terms and masks as kernels read them; without bounds, which depend on the tiles."""
    table, table_stride = _with_margins(a.table, a.q.shape[2], a.k.shape[2])
    positions = {}
    for name in ("q_position", "k_position"):
        x = None if getattr(a, name) is None else rows(getattr(a, name).to(a.q.dtype))
        positions |= {name: x, f"{name}_strides": None if x is None else x.stride()[:3]}
    return Terms(
        table=table, table_stride=table_stride,
        bias=a.bias, bias_strides=None if a.bias is None else broadcast_strides(a.bias),
        same=None if a.same is None else a.same.float().contiguous(), q_bounds=None, k_bounds=None, **positions,
        **{name: None if getattr(a, name) is None else getattr(a, name).to(a.q.dtype).contiguous() for name in VECTORS},
        **{name: None if getattr(a, name) is None else _integers(getattr(a, name)) for name in INTEGERS},
    )  # fmt: skip


def with_bounds(t: Terms, tiles: Tiles) -> Terms:
    """The terms with each tile's least and largest segment, where there are segments."""
    if t.q_segments is None:
        return t
    return t._replace(q_bounds=_bounds(t.q_segments, tiles.BLOCK_M), k_bounds=_bounds(t.k_segments, tiles.BLOCK_N))


def numbers(a: tuple) -> tuple:
    """The fields of kernels.terms.Numbers, which kernels take one by one so that Triton need not compile for each
    value."""
    (_, H, Lq, _), (Hk, Lk) = a.q.shape, a.k.shape[1:3]
    drops = (a.seed, threshold(a.dropout)) if a.dropout else (0, None)
    return H, H // Hk, Lq, Lk, a.left, a.right, a.offset, a.scale, *drops, 1 / (1 - a.dropout)


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """x's strides, 0 where it has one element for all."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def architecture() -> int:
    """The compute capability kernels will run on, such as 90; the interpreter takes the tiles of 90."""
    return 90 if INTERPRETED.value else triton.runtime.driver.active.get_current_target().arch


def _with_margins(table: Tensor | None, Lq: int, Lk: int) -> tuple[Tensor | None, int]:
    """(table [H, Lq + Lk - 1], stride of a row), such that tiles hanging over the end may read past both ends of a row.

    What they find there is the score of no query or no key. Only where tiles do hang over does this make a copy.
    """
    if table is None:
        return None, 0
    table = table.float()
    if Lq % LARGEST == 0 and Lk % LARGEST == 0:
        return table.contiguous(), table.shape[1]
    table = torch.nn.functional.pad(table, (LARGEST, LARGEST))
    return table[:, LARGEST:], table.stride(0)


def _integers(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.int32, torch.int64) else x.int()).contiguous()


def _bounds(segments: Tensor, block: int) -> Tensor:
    """segments [B, L] → [B, 2, tiles]: the least and the largest of each tile, the last one filled up with its last."""
    tiles = triton.cdiv(segments.shape[1], block)
    missing = tiles * block - segments.shape[1]
    whole = torch.cat((segments, segments[:, -1:].expand(-1, missing)), 1) if missing else segments
    return torch.stack(whole.unflatten(1, (tiles, block)).aminmax(dim=2), 1)

"""Logits in chunks of rows, and the gradients that chunks add up to: the products of linear_cross_entropy.py.

Where 16 bits are multiplied faster than fp32, on GPUs and, in bf16, on CPUs with instructions for it, they are
multiplied as they are, and a chunk's logits and their gradient have 16 bits too, as F.linear's have; what chunks add up
to is fp32. Elsewhere all is fp32 (fp64 for fp64 hidden), and a weight of 16 bits is there in fp32 a tile at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends import native, pages
from fastlm.ops import ranks

TILE = 4 * 2**20  # bytes of weight that are multiplied at a time, or of a product that is then added to fp32
ALIGNED = 64  # words by which rows lie apart, for products and kernels take whole vectors


class Chunk(NamedTuple):
    """Logits that are there at a time: the most of so many bytes, so many rows, and a twentieth of all rows.

    Weight's gradient is read and written for each chunk, and products of few rows are slow: of 96 at two thirds of the
    speed of 192 on a CPU. On an H100, by bytes and operations, a chunk of R rows costs 280 / R of its products' time.
    """

    bytes: int
    rows: int
    share: int = 20

    def size(self, words: int, itemsize: int, rows: int) -> int:
        """In rows, for rows of so many words."""
        return max(self.bytes // (words * itemsize), self.rows, rows // self.share)


CPU, GPU = Chunk(12 * 2**20, 192), Chunk(2**29, 1024)


class Arguments(NamedTuple):
    """The op's arguments by name, in its order.

    softcap 0: none. weight and bias are of the words first, first + 1, … of `words` in all; the others are on the other
    ranks of the process group of that name, "" for none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    temperature: float
    first: int
    words: int
    group: str


class Sums(NamedTuple):
    """Gradients of hidden, weight and bias while chunks of rows add to them in order; empty where none is wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def shapes(a: Arguments, of_hidden: bool = True, of_weight: bool = True) -> tuple[tuple[int, ...], ...]:
        words = 0 if a.bias is None else len(a.weight)
        return a.hidden.shape if of_hidden else (0,), a.weight.shape if of_weight else (0,), (words,)

    @staticmethod
    def zeros(a: Arguments, of_hidden: bool = True, of_weight: bool = True) -> "Sums":
        dtype = torch.promote_types(a.hidden.dtype, torch.float32)
        return Sums(*(pages.zeros(*s, like=a.hidden, dtype=dtype) for s in Sums.shapes(a, of_hidden, of_weight)))

    def add(self, a: Arguments, rows: Tensor, dx: Tensor) -> None:
        """Add a chunk's, of whose logits dx [rows, V] is the gradient."""
        h = a.hidden[rows].to(dx.dtype)
        d_h = self.hidden.new_zeros(h.shape)
        for begin, w in _tiles(a):
            part = dx[:, begin : begin + len(w)]
            if len(self.hidden):
                _add_product(part, w, d_h)
            if len(self.weight):
                _add_product(part.mT, h, self.weight[begin : begin + len(w)])
        if len(self.hidden):
            self.hidden[rows] = d_h
        if a.bias is not None:
            self.bias.add_(dx.sum(0, dtype=self.bias.dtype))

    def over_ranks(self, a: Arguments) -> "Sums":
        """The same where each rank has added what its own words give: hidden's is the sum of all."""
        return self._replace(hidden=ranks.summed(self.hidden, a.group)) if a.group and len(self.hidden) else self

    def like(self, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of what they are gradients of."""
        bias = self.bias if a.bias is None else self.bias.to(a.bias.dtype)
        return self.hidden.to(a.hidden.dtype), self.weight.to(a.weight.dtype), bias


def zeros_of_rows(a: Arguments) -> Tensor:
    """[N] in the dtype of sums."""
    return a.hidden.new_zeros(len(a.hidden), dtype=torch.promote_types(a.hidden.dtype, torch.float32))


def chunks(a: Arguments) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices of rows with a target, their products with weight [rows, V] in one buffer), chunk by chunk; the same
    rows on every rank.
    """
    targets, V, dtype = _targets(a), len(a.weight), operands(a)
    most = -(-a.words // ranks.size(a.group))  # words of the rank that has most
    together = (GPU if on_gpu(a.hidden.device) else CPU).size(most, dtype.itemsize, len(targets))
    apart = -(-V // ALIGNED) * ALIGNED
    buffer = a.hidden.new_empty(min(together, len(targets)), apart, dtype=dtype)[:, :V]
    for rows in targets.split(together):
        if len(rows) == 0:
            return
        h, x = a.hidden[rows].to(dtype), buffer[: len(rows)]
        for begin, w in _tiles(a):
            torch.mm(h, w.mT, out=x[:, begin : begin + len(w)])
        yield rows, x


def _targets(a: Arguments) -> Tensor:
    """Rows with a target. A GPU has to be waited for until they are counted, which cannot be while a CUDA graph is
    captured: then all rows, and those without a target count nothing.
    """
    if capturing(a.hidden.device):
        return torch.arange(len(a.labels), device=a.labels.device)
    return has_target(a, a.labels).nonzero().squeeze(1)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def has_target(a: Arguments, labels: Tensor) -> Tensor:
    return labels != a.ignore_index


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these 16 bits are multiplied faster than fp32, and added up in fp32."""
    return on_gpu(device) or (device.type == "cpu" and dtype == torch.bfloat16 and native.cpp_multiplies_bf16())


def operands(a: Arguments) -> torch.dtype:
    """Of what is multiplied, and of a chunk's logits."""
    as_it_is = a.hidden.dtype == a.weight.dtype and multiplies(a.hidden.dtype, a.hidden.device)
    return a.hidden.dtype if as_it_is else torch.promote_types(a.hidden.dtype, torch.float32)


def _tiles(a: Arguments) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of weight as an operand): all at once where they need no copy, but for fp32 on a CPU, of which
    tiles that stay in the cache are multiplied faster.
    """
    dtype = operands(a)
    whole = a.weight.dtype == dtype and (on_gpu(a.hidden.device) or dtype.itemsize == 2)
    size = len(a.weight) if whole else max(1, TILE // (a.weight.shape[1] * dtype.itemsize))
    for begin in range(0, len(a.weight), size):
        yield begin, a.weight[begin : begin + size].to(dtype)


def _add_product(x: Tensor, y: Tensor, to: Tensor) -> None:
    """to += x y. On a CPU a product of 16 bits is rounded to them before it is added, a tile at a time."""
    if x.dtype == to.dtype:
        torch.addmm(to, x, y, out=to)
    elif on_gpu(to.device):
        torch.addmm(to, x, y, out_dtype=to.dtype, out=to)
    else:
        size = max(1, TILE // (to.shape[1] * x.dtype.itemsize))
        for sums, rows in zip(to.split(size), x.split(size), strict=True):
            sums += rows @ y

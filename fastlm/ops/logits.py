"""Logits in chunks of rows, and the gradients that chunks add up to: the products of linear_cross_entropy.py.

Sums are fp32 (fp64 for fp64 hidden). On a CPU products are of fp32 too, which it multiplies faster than 16 bits; a
weight of 16 bits is then there in fp32 a tile at a time. On a GPU 16 bits are multiplied as they are, the gradient of a
chunk's logits rounded to them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends import pages

# Logits that are there at a time: the most of so many bytes, so many rows, without which products run at two thirds of
# their speed, and a twentieth of all rows, for weight's gradient is read and written for each chunk.
CHUNK, ROWS, CHUNKS = 12 * 2**20, 192, 20
TILE = 4 * 2**20  # bytes of a 16-bit weight that are there in fp32 at a time


class Arguments(NamedTuple):
    """The op's arguments by name, in its order. softcap 0: none."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    temperature: float


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
        h, g = a.hidden[rows].to(operands(a)), dx.to(operands(a))
        d_h = dx.new_zeros(h.shape)
        for begin, w in _tiles(a):
            part = g[:, begin : begin + len(w)]
            if len(self.hidden):
                _add_product(part, w, d_h)
            if len(self.weight):
                _add_product(part.mT, h, self.weight[begin : begin + len(w)])
        if len(self.hidden):
            self.hidden[rows] = d_h
        if a.bias is not None:
            self.bias.add_(dx.sum(0))

    def like(self, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of what they are gradients of."""
        bias = self.bias if a.bias is None else self.bias.to(a.bias.dtype)
        return self.hidden.to(a.hidden.dtype), self.weight.to(a.weight.dtype), bias


def zeros_of_rows(a: Arguments) -> Tensor:
    """[N] in the dtype of sums."""
    return a.hidden.new_zeros(len(a.hidden), dtype=torch.promote_types(a.hidden.dtype, torch.float32))


def chunks(a: Arguments) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices of rows with a target, their x [rows, V] in one buffer), chunk by chunk."""
    wide = torch.promote_types(a.hidden.dtype, torch.float32)
    V = len(a.weight)
    targets = (a.labels != a.ignore_index).nonzero().squeeze(1)
    together = max(CHUNK // (V * wide.itemsize), ROWS, len(targets) // CHUNKS)
    buffer = a.hidden.new_empty(min(together, len(targets)), V, dtype=wide)
    for rows in targets.split(together):
        if len(rows) == 0:
            return
        h, x = a.hidden[rows].to(operands(a)), buffer[: len(rows)]
        for begin, w in _tiles(a):
            _product(h, w.mT, x[:, begin : begin + len(w)])
        yield rows, x if a.bias is None else x.add_(a.bias)


def multiplies_16_bits(device: torch.device) -> bool:
    """Whether 16 bits are multiplied faster than fp32, and added up in fp32."""
    return device.type == "cuda"


def operands(a: Arguments) -> torch.dtype:
    """Of what is multiplied."""
    as_it_is = a.hidden.dtype == a.weight.dtype and multiplies_16_bits(a.hidden.device)
    return a.hidden.dtype if as_it_is else torch.promote_types(a.hidden.dtype, torch.float32)


def _tiles(a: Arguments) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of weight as an operand): the weight itself where it is one."""
    dtype = operands(a)
    size = len(a.weight) if a.weight.dtype == dtype else max(1, TILE // (a.weight.shape[1] * dtype.itemsize))
    for begin in range(0, len(a.weight), size):
        yield begin, a.weight[begin : begin + size].to(dtype)


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    torch.mm(x, y, out=out) if x.dtype == out.dtype else torch.mm(x, y, out_dtype=out.dtype, out=out)


def _add_product(x: Tensor, y: Tensor, to: Tensor) -> None:
    to.addmm_(x, y) if x.dtype == to.dtype else to.add_(torch.mm(x, y, out_dtype=to.dtype))

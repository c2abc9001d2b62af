"""Texts as rows of ids, as the models that read them saw rows in pretraining:

an encoder, whose first state is read        <s> first <eos>    <s> first <eos> second <eos>
XLNet, whose last state is read              first <eos> <s>    first <eos> second <eos> <s>    padded on the left
a decoder, and an encoder–decoder            first <eos>        first <eos> second <eos>
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.models import ModelConfig
from fastlm.models.heads import POOLINGS
from fastlm.objectives import Vocabulary


class Ids(NamedTuple):
    """A row.

    Args:
        ids: all of them.
        second: where the second text begins; len(ids) where there is none.
        cut: how many ids of the texts were left out, for they were too many.
    """

    ids: list[int]
    second: int
    cut: int = 0


@dataclass(frozen=True)
class Layout:
    """How a model's rows are laid out.

    Args:
        context: ids of a row at most.
        front: what stands before the texts; back: what stands after them.
        left: whether padding stands on the left.
        apart: whether a decoder writes the second text, and it is no part of the row.
        types: whether the second text has a token type of its own.
        eos, pad: ids.
    """

    context: int
    front: tuple[int, ...]
    back: tuple[int, ...]
    left: bool
    apart: bool
    types: bool
    eos: int
    pad: int

    @classmethod
    def of(cls, shape: ModelConfig, pooling: str, known: Vocabulary) -> "Layout":
        """That of a model's rows, of which a head reads the state that its pooling says."""
        token = POOLINGS[pooling].token
        front = (known.begin,) if shape.kind == "encoder" and token == "first" else ()
        back = (known.begin,) if token == "last" else ()
        types = shape.token_types > 1 or shape.relative_segments
        apart = shape.kind == "encoder-decoder"
        return cls(shape.context, front, back, token == "last", apart, types, known.eos, known.pad)

    def room(self, texts: int) -> int:
        """How many ids of so many texts there is room for."""
        return self.context - len(self.front) - len(self.back) - texts

    def row(self, first: Sequence[int], second: Sequence[int] | None) -> Ids:
        """Two texts, or one, as a row. Where they are too long, the longer loses its end, and then both do in turn, as
        in BERT.
        """
        room = self.room(1 if second is None else 2)
        a, b = len(first), 0 if second is None else len(second)
        kept_a = min(a, max(room - b, (room + 1) // 2))
        kept_b = min(b, room - kept_a)
        ids = [*self.front, *first[:kept_a], self.eos]
        begin = len(ids)
        if second is not None:
            ids += [*second[:kept_b], self.eos]
        ids += self.back
        return Ids(ids, begin if second is not None else len(ids), a + b - kept_a - kept_b)

    def batch(self, rows: Sequence[Ids]) -> dict[str, Tensor]:
        """inputs [B, L] int64, filled up with <pad> to the longest; real [B, L] bool; types [B, L] int64 where the
        model has them.
        """
        longest = max(len(row.ids) for row in rows)
        inputs = torch.full((len(rows), longest), self.pad)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        types = torch.zeros_like(inputs)
        for i, (ids, second, _) in enumerate(rows):
            at = longest - len(ids) if self.left else 0
            inputs[i, at : at + len(ids)] = torch.tensor(ids)
            real[i, at : at + len(ids)] = True
            types[i, at + second : at + len(ids) - len(self.back)] = 1
        return {"inputs": inputs, "real": real} | ({"types": types} if self.types else {})

"""Schemes of which the layers of a stack share a part: Transformer-XL's sinusoids and biases, DeBERTa's table.

The stack makes the part once a forward pass, by `SharedPart.terms`, and every layer goes on from there with what it has
learned itself, by `LayerPosition.finish`. A scheme that stands alone has a part of its own.
"""

import inspect
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastlm.positions.base import SCHEMES, Position, Terms, Vectors

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


class SharedTerms(NamedTuple):
    """What a stack hands its layers of a scheme that they share a part of, for `nn.Attention`'s position.

    Args:
        part: what the part's forward gave.
        distance: [Lq + Lk - 1] int64, key position minus query position.
        size: (Lq, Lk, offset) of the calls that these terms fit.
    """

    part: tuple
    distance: Tensor
    size: tuple[int, int, int]


class SharedPart(nn.Module):
    """The part of a scheme that the layers of a stack share. Its forward takes distances [n] int64."""

    def embed(self, positions: Tensor) -> None:
        """None: these schemes add nothing to the token embeddings."""
        return None

    def terms(
        self, Lq: int, Lk: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> SharedTerms:
        """The part in attention calls of Lq queries and Lk keys, the last query at the last key; its floats in dtype,
        the layers'.
        """
        distance = torch.arange(1 - Lk, Lq, device=device)
        part = tuple(x if x is None or not x.is_floating_point() else x.to(dtype) for x in self(distance))
        return SharedTerms(part, distance, (Lq, Lk, Lk - Lq))

    def reset_parameters(self) -> None:
        """Draw the part's own parameters anew, as `Position.reset_parameters` does."""
        Position.reset_parameters(self)


class LayerPosition(Position):
    """A scheme of one layer, of which the layers of a stack share a part.

    Attributes:
        part: the class of that part.
    """

    per_layer = True
    part: ClassVar[type[SharedPart]]

    def vectors(self, distance: Tensor) -> Vectors:
        """Of distances [n] int64, by the part of its own that a scheme has which stands alone."""
        own = self.own_part()
        if own is None:
            raise ValueError(
                f"the {type(self).__name__} was made with shared=True, and goes on from what its stack hands it; make "
                "it with shared=False to stand alone"
            )
        return self.complete(own(distance), distance)

    def own_part(self) -> SharedPart | None:
        """The scheme's own part; None where it is made for a stack's."""
        raise NotImplementedError

    def complete(self, part: tuple, distance: Tensor, project: Project | None = None) -> Vectors:
        """`vectors` from what the part's forward gave; project is as in `finish`."""
        raise NotImplementedError

    def finish(self, terms: SharedTerms, project: Project) -> Terms:
        """The layer's terms from its stack's.

        Args:
            terms: what `SharedPart.terms` gave.
            project: the layer's projections of rows to queries and keys: [n, dim] → [heads, n, D] and [kv_heads, n, D].

        Returns:
            `Terms` for `fastlm.attention`.
        """
        return Terms(vectors=self.complete(terms.part, terms.distance, project), size=terms.size)


def make_shared(name: str, **facts) -> SharedPart | None:
    """The part that layers with the scheme called `name` share, or None where they share none.

    Args:
        name: a key of SCHEMES.
        facts: as in `make`.
    """
    scheme = SCHEMES[name]
    if not issubclass(scheme, LayerPosition):
        return None
    wanted = inspect.signature(scheme.part).parameters
    return scheme.part(**{fact: value for fact, value in facts.items() if fact in wanted})

"""What a model remembers of the segments before: Transformer-XL's memory (Dai et al. 2019, sec. 3.2), XLNet's too."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastlm.models.transformer import Transformer


class Recurrence:
    """The input of each layer for the tokens before, detached: a layer's keys and values are made of it and its input.

        recurrence = model.new_recurrence()
        for segment in segments:                             # of a stream of text in each row, in its order
            logits = model(segment, recurrence=recurrence)   # sees the segments before, and joins them

    A forward pass replaces what it holds, so each micro-batch of accumulated gradients has one of its own. It starts
    empty; len(recurrence) is the number of tokens it holds.

    Args:
        length: tokens it holds at most.
        reuse: how many of a segment's first tokens join it (XLNet's reuse_len). Default all.

    Attributes:
        states: of each layer in order, [B, len(recurrence), dim]; none while it is empty.
    """

    def __init__(self, length: int, reuse: int | None = None):
        self.length, self.reuse = length, reuse
        self.states: list[Tensor] = []

    def __len__(self) -> int:
        return self.states[0].shape[1] if self.states else 0

    def __bool__(self) -> bool:
        return True  # an empty one is one too

    def extend(self, layer: int, x: Tensor) -> Tensor:
        """Let a layer's input join.

        Args:
            layer: the layer's place in its stack; each in turn.
            x: [B, L, dim], its input.

        Returns:
            [B, len(recurrence) + L, dim]: what it held, detached, and x.

        Raises:
            ValueError: where x has another batch or width than what it holds.
        """
        before = self.states[layer] if layer < len(self.states) else x.new_empty(x.shape[0], 0, x.shape[2])
        if (before.shape[0], before.shape[2]) != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"the recurrence holds states {list(before.shape)} and is given {list(x.shape)}, which differ in more "
                "than length; a new batch takes a new_recurrence() of its own"
            )
        source = torch.cat((before, x), 1)
        held = source if self.reuse is None else torch.cat((before, x[:, : self.reuse]), 1)
        self.states[layer : layer + 1] = [held.detach()[:, max(held.shape[1] - self.length, 0) :].clone()]
        return source

    def copy(self) -> "Recurrence":
        """Another one that holds the same, and goes on by itself."""
        made = Recurrence(self.length, self.reuse)
        made.states = list(self.states)
        return made

    def reorder(self, rows: Tensor) -> None:
        """Make row b of the batch what row rows[b] was, [n] int64, as beam search does."""
        self.states = [x[rows] for x in self.states]

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, for a checkpoint."""
        return {str(layer): x for layer, x in enumerate(self.states)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold what another one's `state_dict` gave."""
        self.states = [state[str(layer)] for layer in range(len(state))]


class Remembering(nn.Module):
    """A model all of whose calls continue one recurrence, for those who call it and need not know of that.

    Args:
        model: with memory in its config, or whatever length the recurrence has.
        recurrence: from its `new_recurrence`.
    """

    def __init__(self, model: "Transformer", recurrence: Recurrence):
        super().__init__()
        self.model, self.recurrence = model, recurrence

    @property
    def head(self) -> nn.Module:
        """The model's."""
        return self.model.head

    def forward(self, tokens: Tensor, **options) -> Tensor:
        """As `Transformer.forward`."""
        return self.model(tokens, recurrence=self.recurrence, **options)

    def states(self, tokens: Tensor, **options) -> Tensor:
        """As `Transformer.states`."""
        return self.model.states(tokens, recurrence=self.recurrence, **options)

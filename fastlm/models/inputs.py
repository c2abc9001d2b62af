"""What a call gives a stack besides its tokens, and what follows from it: positions, masks, documents."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm import masks
from fastlm.models import two_stream
from fastlm.models.config import ModelConfig
from fastlm.models.recurrence import Recurrence
from fastlm.nn import KVCache

INTEGERS = (torch.int64, torch.int32)  # of tokens, as torch.nn.Embedding takes them


class Memory(NamedTuple):
    """What a decoder attends to besides its own tokens.

    Args:
        states: [B, S, dim], the encoder's output.
        real: [B, S] bool, which of them are no padding; None for all.
        segments: [B, S] int, the packed document of each; None for one a row.
    """

    states: Tensor
    real: Tensor | None = None
    segments: Tensor | None = None


class Inputs(NamedTuple):
    """What a stack is given of a call besides its L tokens; `Transformer.states` says what each is.

    Args:
        real: [B, seen + L] bool or int, which tokens are no padding; None for all.
        segments: [B, L] int, the packed document of each token; None for one a row.
        types: [B, L] int64, each token's type; None for 0.
        positions: [L] or [B, L] int64; None for those that follow from the rest.
        prefix: [B] int; tokens before it see one another.
        memory: an encoder's states.
        caches: one for each block in the stack's order; the tokens continue what they hold, and join it.
        recurrence: the segments before, likewise.
        ranks: [B, L] int; tokens see those that rank no higher.
        predicted: [B, P] int64, the tokens of which the query stream's states are returned.
    """

    real: Tensor | None = None
    segments: Tensor | None = None
    types: Tensor | None = None
    positions: Tensor | None = None
    prefix: Tensor | None = None
    memory: Memory | None = None
    caches: list[KVCache] | None = None
    recurrence: Recurrence | None = None
    ranks: Tensor | None = None
    predicted: Tensor | None = None

    @property
    def seen(self) -> int:
        """How many tokens caches or the recurrence hold."""
        if self.caches:
            return len(self.caches[0])
        return 0 if self.recurrence is None else len(self.recurrence)

    def check(self, tokens: Tensor, config: ModelConfig, blocks: int) -> None:
        """Raise ValueError for what does not fit together, with tokens or with a stack of so many blocks."""
        B, L = shape_of(tokens)
        self._check_together(config.two_streams)
        self._check_memory(B)
        if self.caches is not None and len({id(cache) for cache in self.caches}) != blocks:
            raise ValueError(f"caches must be {blocks}, one for each layer of the decoder; take new_caches()")
        seen = self.seen
        if self.real is not None and (self.real.is_floating_point() or self.real.shape != (B, seen + L)):
            raise ValueError(
                f"the attention mask must be {[B, seen + L]} bool or int, of all tokens so far; got "
                f"{list(self.real.shape)} {self.real.dtype}"
            )
        if self.types is not None and not (config.token_types or config.relative_segments):
            raise ValueError("token_types are given, and config.token_types is 0; leave them out")
        if self.types is not None and self.types.shape != (B, L):
            raise ValueError(f"token_types must be {[B, L]}, as the tokens are; got {list(self.types.shape)}")
        if self.positions is not None and self.positions.shape not in ((L,), (B, L)):
            raise ValueError(f"positions must be {[L]} or {[B, L]}; got {list(self.positions.shape)}")

    def _check_memory(self, B: int) -> None:
        if self.memory is None:
            return
        if not (isinstance(self.memory, Memory) and self.memory.states.ndim == 3 and len(self.memory.states) == B):
            raise ValueError(f"memory must be what encode made of {B} rows of tokens")
        for name, value in (("real", self.memory.real), ("segments", self.memory.segments)):
            if value is not None and value.shape != self.memory.states.shape[:2]:
                raise ValueError(
                    f"memory.{name} must be {list(self.memory.states.shape[:2])}, as its states are; "
                    f"got {list(value.shape)}"
                )
        if (self.memory.segments is None) != (self.segments is None):
            raise ValueError("packed rows need segments of the encoder's tokens and of the decoder's; got one of them")

    def _check_together(self, two_streams: bool) -> None:
        if (self.caches or self.recurrence is not None) and self.segments is not None:
            raise ValueError("segments are for rows that continue nothing; caches and a recurrence have one text a row")
        if self.caches and self.recurrence is not None:
            raise ValueError("caches and a recurrence both hold the tokens before; give one of them")
        if self.predicted is not None and (self.ranks is None or not two_streams):
            raise ValueError("predicted tokens need ranks, and a model with two_streams=True")

    def places(self, L: int, skip_padding: bool, device: torch.device) -> Tensor:
        """Where tokens stand, [L] or [B, L] int64, for schemes that add to embeddings."""
        if self.positions is not None:
            return self.positions
        if self.segments is not None:
            return masks.position_ids(self.segments)
        if self.real is not None and skip_padding:
            return (self.real.long().cumsum(-1) - 1).clamp(min=0)[:, self.seen :]
        return torch.arange(self.seen, self.seen + L, device=device)

    def masks(self, L: int, relative_segments: bool) -> dict:
        """The arguments of `fastlm.nn.Attention` that hide keys of the stack's own tokens, or tell them apart."""
        made = masks.padding(self.real, L, self.segments)
        if self.prefix is not None:
            made["prefix"] = self.prefix
        if self.ranks is not None:
            made["order"] = two_stream.order(self.ranks, self.seen)
        if relative_segments and self.types is not None:
            made["groups"] = two_stream.groups(self.types, self.seen)
        return made

    def memory_masks(self, L: int) -> dict:
        """The arguments of `fastlm.attention` that hide an encoder's padding, and other documents."""
        if self.memory is None:
            return {}
        if self.segments is None:
            return masks.padding(self.memory.real, L)
        of_memory = self.memory.segments
        if self.memory.real is not None:
            of_memory = masks.padding_apart(of_memory, self.memory.real)
        return {"segments": (self.segments, of_memory)}

    def documents(self) -> Tensor | None:
        """[B, L] int, the document of each token, that of padding one of its own; None for one a row."""
        if self.real is None:
            return self.segments
        real = self.real.bool()
        return real.long() if self.segments is None else masks.padding_apart(self.segments, real)


def shape_of(tokens: Tensor, dtypes: tuple[torch.dtype, ...] = INTEGERS) -> tuple[int, int]:
    """[B, L] of a model's tokens. Raises ValueError for what are none."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not tokens.shape[1] or tokens.dtype not in dtypes:
        got = f"{list(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise ValueError(f"tokens must be [B, L] int64, with at least one in a row; got {got}")
    return tokens.shape

"""Masked language modelling under several masks: a row's hidden tokens are predicted from both sides, or from one."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models.heads import Factors
from fastlm.objectives.base import Batch, Decode
from fastlm.objectives.masked import Masked, filled_in, states_at
from fastlm.objectives.noise import Purpose, Samples, pick
from fastlm.objectives.vocabulary import Vocabulary


class MultitaskMasked(Masked, name="multitask-mlm"):
    """UniLM's objective (Dong et al. 2019, sec. 2.3), as BART's comparison has it (Lewis et al. 2020, sec. 4.1).

    Tokens are hidden as in `Masked`. What the tokens of a row see is drawn for it anew at each visit:

        both      all tokens
        left      themselves, and those to their left
        right     themselves, and those to their right
        prefix    the first half of the row; those of the second half also what `left` says

    A batch has inputs [B, L], places [B, n] and labels [B, n] as in `Masked`, and ranks [B, L], by which tokens see
    those that rank no higher; all int64.

    Args:
        tokens, context, vocabulary, rounds, masking: as in `Masked`.
        both: how often, in proportion to the other three. Default 2.
        left: likewise. Default 1.
        right: likewise. Default 1.
        prefix: likewise. Default 2.

    Raises:
        ValueError: as `Masked`, and unless the four are 0 or more, and not all 0.
    """

    shape: ClassVar[dict] = Masked.shape | {"mask_decoder": False}

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        vocabulary: Vocabulary,
        rounds: int | None = None,
        both: float = 2.0,
        left: float = 1.0,
        right: float = 1.0,
        prefix: float = 2.0,
        **masking: object,
    ):
        super().__init__(tokens, context, vocabulary, rounds, **masking)
        self.proportions = {"both": both, "left": left, "right": right, "prefix": prefix}
        if min(self.proportions.values()) < 0 or not 0 < sum(self.proportions.values()) < float("inf"):
            raise ValueError(
                f"both, left, right and prefix are {self.proportions}; give numbers ≥ 0, one of them above"
            )
        place = torch.arange(context)
        self._ranks = torch.stack([0 * place, place, -place, (place - (context // 2 - 1)).clamp(min=0)])

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        batch = super().make(rows, samples)
        drawn = pick(samples.draw(1, Purpose.MASK)[..., 0], list(self.proportions.values()))
        return batch | {"ranks": self._ranks[drawn.expand(len(rows))]}

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        return model.head.factors(states_at(model.states(batch["inputs"], ranks=batch["ranks"]), batch["places"]))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text as in `Masked`, once for each mask that is drawn, with its name before it."""
        batch = self.any_fixed(generator)
        told = []
        for (name, proportion), ranks in zip(self.proportions.items(), self._ranks, strict=True):
            if proportion:
                seen = batch | {"ranks": ranks[None].to(generator.device)}
                told.append(f"{name}: {filled_in(batch, self.logits(model, seen), n, decode)}")
        return "\n".join(told)

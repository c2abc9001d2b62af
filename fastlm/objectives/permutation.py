"""Permutation language modelling: predict some tokens in a random order, each from the text and those before it."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.checks import whole
from fastlm.models.heads import Factors
from fastlm.objectives.base import IGNORED, Batch, Decode
from fastlm.objectives.masked import filled_in
from fastlm.objectives.noise import WORD, Samples
from fastlm.objectives.noise.masking import run_lengths
from fastlm.objectives.noise.sentences import documents
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary

LONGEST = 5  # tokens of a span


class Permutation(RowObjective, name="permutation"):
    """XLNet's objective (Yang et al. 2019, sec. 2.3): -Σ log p(x_z(t) | x_z(<t)) over the last 1/K of an order z.

    A row falls into contexts of K · n tokens, n from 1 to 5 with p ∝ 1/n, in each of which a span of n tokens is
    predicted, at an even place (sec. 3.1); what lacks to round(L / K) targets is single tokens, and what is over goes.
    The predicted ones are put in a random order. All others come before them: they are seen by all and see no target.

    A batch has inputs [B, L], the text; places [B, n], where targets are, and labels [B, n], the tokens there, or
    IGNORED where a row has fewer that are no special ones; ranks [B, L], -1 for tokens that are given, and the place in
    the order for the others; types [B, L], the document of each, for relative segments; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        k: K, of how many tokens one is predicted; at least 2. Default 6.
        streams: as in `RowObjective`. The rows before, which a model with memory holds, are seen by all, targets too
            (sec. 2.5), and count as of the row's first document.

    Raises:
        ValueError: if the stream is too short for a single row or for so many streams, or a row for a single target.
    """

    kind = "encoder"
    continues = True
    shape: ClassVar[dict] = {
        "pair_labels": 0,
        "head": "lm",
        "mask_decoder": False,
        "two_streams": True,
        "token_types": 0,
        "memory_reuse": None,  # all of a row, for the next one begins where it ends
    }
    shares = ("accuracy",)

    def __init__(
        self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, k: int = 6, streams: int | None = None
    ):
        super().__init__(tokens, context, vocabulary, streams=streams)
        whole(1, k=k)
        self.k, self.count = k, round(context / k)
        if self.count < 1:
            raise ValueError(f"rows of {context}, of which 1/{k} is not one target; give a larger --context")

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        L, n = self.context, self.count
        lengths, starts, single, order = samples.draw(2 * -(-L // self.k) + L + n).split(
            (-(-L // self.k), -(-L // self.k), L, n), -1
        )
        text = rows >= self.vocabulary.specials
        # spans first, from the row's start on; then any others; special tokens last
        first = torch.where(self._spans(lengths, starts), torch.arange(L) - L, single).expand_as(rows)
        places = first.masked_fill(~text, WORD).argsort(dim=-1, stable=True)[:, :n].sort(-1).values
        ranks = torch.full_like(rows, -1).scatter(1, places, order.argsort(dim=-1, stable=True).expand_as(places))
        labels = rows.gather(1, places).masked_fill(~text.gather(1, places), IGNORED)
        types = documents(rows, self.vocabulary)
        return {"inputs": rows, "places": places, "labels": labels, "ranks": ranks, "types": types}

    def _spans(self, lengths: Tensor, starts: Tensor) -> Tensor:
        """[B, contexts] 32-bit words each, for lengths and places of spans → [B, L] bool: which tokens are in one."""
        n = run_lengths(lengths, LONGEST)
        ends = (self.k * n).cumsum(-1)
        begins = ends - self.k * n + starts * ((self.k - 1) * n + 1) // WORD
        token = torch.arange(self.context).expand(len(n), -1).contiguous()
        context = torch.searchsorted(ends, token, right=True)
        begin = begins.gather(1, context)
        return (begin <= token) & (token < begin + n.gather(1, context))

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        states = model.states(
            batch["inputs"], ranks=batch["ranks"], predicted=batch["places"], token_types=batch["types"]
        )  # fmt: skip
        return model.head.factors(states)

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text, a predicted token as [the likeliest], or [the likeliest|what is there] where they
        differ.
        """
        batch = self.any_fixed(generator)
        return filled_in(batch, self.logits(model, batch), n, decode)

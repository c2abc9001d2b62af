"""SpanBERT's objective: hide spans, and predict them twice, from where they stood and from what is beside them."""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import whole
from fastlm.models import ModelConfig, SpanBERT, Transformer
from fastlm.models.heads import Factors
from fastlm.objectives.base import IGNORED, Batch, Decode, Shares, Terms, hits, summed_cross_entropy
from fastlm.objectives.masked import filled_in, states_at
from fastlm.objectives.noise import Samples
from fastlm.objectives.noise.masking import Hides, Masking
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary


class SpanBoundary(Hides, RowObjective, name="span-boundary"):
    """Masked language modelling of spans, and of the same tokens from their spans' boundaries (Joshi et al. 2020).

    A row is <s> text <eos>, so that each span has a token on either side. Hidden are runs of whole words, of which
    there are n with p ∝ 0.8ⁿ, at most 10, 3.8 on average; what becomes of a run's tokens, 80/10/10, is drawn once for
    all of them (sec. 3.1). Runs that touch are one span. The term "mlm" predicts each token from its own state,
    "boundary" from those of the tokens before and after its span and from its place in it (sec. 3.2).

    A batch has inputs [B, L], places [B, n] and labels [B, n] as in `Masked`; before and after [B, n], where the tokens
    beside each place's span stand; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`; the vocabulary with its words.
        masking: more of how tokens are hidden: arguments of `Masking`, such as rate (default 0.15).

    Raises:
        ValueError: if the stream is too short for a single row, or a row for a single target.
    """

    kind = "encoder"
    shape: ClassVar[dict] = {"pair_labels": 0, "head": "lm", "two_streams": False}
    compared = "mlm"
    shares = ("accuracy", "boundary_accuracy")

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, **masking: object):
        whole(1, context=context)
        if context < 3:
            raise ValueError(f"rows of {context}, fewer than <s>, a token and <eos>; give a larger --context")
        super().__init__(tokens, context, vocabulary, length=context - 2)
        vocabulary.check_knows("begins_word")
        self.masking = Masking(**dict(whole_words=True, ngram=10, geometric=0.2, alike=True) | masking)
        self.masking.check(context)

    def model(self, config: ModelConfig) -> nn.Module:
        return SpanBERT(config)

    def exported(self, model: nn.Module) -> Transformer:
        """The model without the head of boundaries."""
        return model.model

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        rows = F.pad(F.pad(rows, (1, 0), value=self.vocabulary.begin), (0, 1), value=self.vocabulary.eos)
        hidden = self.masking.hide(rows, samples, self.vocabulary)
        inside = torch.zeros_like(rows, dtype=torch.bool).scatter(1, hidden.places, hidden.labels != IGNORED)
        place = torch.arange(rows.shape[1]).expand_as(rows)
        before = place.masked_fill(inside, -1).cummax(1).values
        after = place.masked_fill(inside, self.context).flip(1).cummin(1).values.flip(1)
        beside = {"before": before.gather(1, hidden.places), "after": after.gather(1, hidden.places)}
        return hidden._asdict() | beside

    def targets(self, batch: Batch) -> dict[str, int]:
        n = int((batch["labels"] != IGNORED).sum())
        return {"mlm": n, "boundary": n}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return self._terms(batch, *self._factors(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        made = [factors.logits() for factors in self._factors(model, batch)]
        right = (hits(logits, batch["labels"]) for logits in made)
        return self._terms(batch, *made), dict(zip(self.shares, right, strict=True))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text as in `Masked`; then → the same row as its spans' boundaries tell it."""
        batch = self.any_fixed(generator)
        return "\n→ ".join(filled_in(batch, made.logits(), n, decode) for made in self._factors(model, batch))

    def _factors(self, model: nn.Module, batch: Batch) -> tuple[Factors, Factors]:
        """Of logits [B, n, vocab_size] each, of "mlm" and "boundary"."""
        states = model.states(batch["inputs"])
        of = lambda name: states_at(states, batch[name])
        in_span = (batch["places"] - batch["before"] - 1).clamp(min=0)
        return model.head.factors(of("places")), model.inside(of("before"), of("after"), in_span)

    def _terms(self, batch: Batch, own: Tensor | Factors, beside: Tensor | Factors) -> Terms:
        return {
            "mlm": summed_cross_entropy(own, batch["labels"]),
            "boundary": summed_cross_entropy(beside, batch["labels"]),
        }

"""Masked language modelling: hide some tokens, and predict them from all the others."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.checks import whole
from fastlm.models.heads import Factors
from fastlm.objectives.base import IGNORED, Batch, Decode
from fastlm.objectives.noise import Samples
from fastlm.objectives.noise.masking import Hides, Masking
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary


class Masked(Hides, RowObjective, name="mlm"):
    """Predict the tokens that were hidden (Devlin et al. 2019): -Σ log p(xᵢ | the corrupted row), in nats.

    In every row round(rate · context) places are drawn without replacement, the same number in each; 80 % of them
    become <mask>, 10 % another token, and 10 % stay. A place is never a special token, nor is what replaces one. Noise
    is drawn anew at each visit (dynamic masking, Liu et al. 2019) unless `rounds` says otherwise. Rows are windows that
    may cross documents, with <eos> between them (Liu et al. 2019, FULL-SENTENCES).

    A batch has inputs [B, L], places [B, n], where targets are, and labels [B, n], the tokens that were there, or
    IGNORED where a row has fewer; all int64. The head reads the states at these places alone.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        rounds: how many different noises a row has, taken in turn: 1 is static masking, 10 BERT's ten copies of the
            data. None: a new one each time.
        masking: more of how tokens are hidden: arguments of `Masking`, such as rate (default 0.15) and ngram.

    Raises:
        ValueError: if the stream is too short for a single row, or a row for a single target.
    """

    kind = "encoder"
    shape: ClassVar[dict] = {"pair_labels": 0, "head": "lm", "two_streams": False}
    shares = ("accuracy",)

    def __init__(
        self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, rounds: int | None = None, **masking: object
    ):
        super().__init__(tokens, context, vocabulary)
        if rounds is not None:
            whole(1, rounds=rounds)
        self.rounds, self.masking = rounds, Masking(**masking)
        self.masking.check(context)
        if self.masking.whole_words:
            vocabulary.check_knows("begins_word")

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        if self.rounds is not None:
            samples = samples._replace(epochs=samples.epochs % self.rounds)
        return self.masking.hide(rows, samples, self.vocabulary)._asdict()

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        return factors_at(model, batch)

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text, a hidden token as [the likeliest], or [the likeliest|what was there] where they differ."""
        batch = self.any_fixed(generator)
        return filled_in(batch, self.logits(model, batch), n, decode)


def factors_at(model: nn.Module, batch: Batch) -> Factors:
    """Of logits [B, n, vocab_size], at the places of a batch."""
    return model.head.factors(states_at(model.states(batch["inputs"]), batch["places"]))


def states_at(states: Tensor, places: Tensor) -> Tensor:
    """states [B, L, dim] at places [B, n] int64: [B, n, dim]."""
    return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[-1]))


def filled_in(batch: Batch, logits: Tensor, n: int, decode: Decode) -> str:
    """The first n tokens of a batch's row, a hidden one as [the likeliest] or [the likeliest|what was there]."""
    guesses = logits[0].argmax(-1).tolist()
    shown = {}
    for place, guess, label in zip(batch["places"][0].tolist(), guesses, batch["labels"][0].tolist(), strict=True):
        if label != IGNORED:
            was = "" if guess == label else f"|{decode([label])}"
            shown[place] = f"[{decode([guess])}{was}]"
    return "".join(shown.get(place) or decode([i]) for place, i in enumerate(batch["inputs"][0, :n].tolist()))

"""MASS: hide a fragment of a text, and have it written from all that is around it."""

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models.heads import Factors
from fastlm.objectives.base import Batch, Decode
from fastlm.objectives.noise import WORD, Samples
from fastlm.objectives.noise.masking import Masking
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary


class MASS(RowObjective, name="mass"):
    """Masked sequence to sequence pretraining (Song et al. 2019): -Σ log p(a fragment's tokens | the rest), in nats.

    Of each row one fragment of round(share · context) tokens is hidden from the encoder: of its tokens 80 % become
    <mask>, 10 % another token, and 10 % stay. The decoder sees the fragment's own tokens alone, each predicted from
    those before it, at the positions that they have in the row; the first is predicted from the token before the
    fragment, <pad> at the row's start.

    A batch has inputs [B, L], and decoder_inputs, positions and labels [B, n], all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        share: of the row that is hidden. Default 0.5; a single token is much like masked, all of it causal language
            modelling.
        ends: share of the fragments that begin where the row does, and share that end where it does, at most 0.5. The
            others begin anywhere. Default 0 (0.2 in the released code).

    Raises:
        ValueError: if the stream is too short for a single row, a row for a fragment.
    """

    kind = "encoder-decoder"
    shares = ("accuracy",)

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, share: float = 0.5, ends: float = 0.0):
        super().__init__(tokens, context, vocabulary)
        self.count, self.ends = round(share * context), ends
        if not 1 <= self.count <= context:
            raise ValueError(f"rows of {context}, of which {share:g} are no fragment; give a larger --context")

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        n, known = self.count, self.vocabulary
        kinds, words, places = samples.draw(2 * n + 2).expand(len(rows), -1).split((n, n, 2), -1)
        begin = places[:, :1] % (self.context - n + 1)
        at_start, at_end = places[:, 1:] < self.ends * WORD, places[:, 1:] >= (1 - self.ends) * WORD
        begin = begin.masked_fill(at_start, 0).masked_fill(at_end, self.context - n)
        positions = begin + torch.arange(n)
        labels = rows.gather(1, positions)
        new = Masking().put_in(labels, kinds, words, known)
        before = torch.nn.functional.pad(rows, (1, 0), value=known.pad).gather(1, begin)
        return {
            "inputs": rows.scatter(1, positions, new),
            "decoder_inputs": torch.cat((before, labels[:, :-1]), 1),
            "positions": positions,
            "labels": labels,
        }

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        return model.head.factors(model.states(batch["inputs"], batch["decoder_inputs"], positions=batch["positions"]))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """The end of a row's first part, the fragment as it is, and → the likeliest token for each of its own."""
        batch = self.any_fixed(generator)
        guesses = self.logits(model, batch)[0].argmax(-1).tolist()
        begin, fragment = batch["positions"][0, 0].item(), batch["labels"][0].tolist()
        text = batch["inputs"][0, :begin].tolist()
        return f"{decode(text[-n:])}[{decode(fragment[:n])}]\n→ {decode(guesses[:n])}"

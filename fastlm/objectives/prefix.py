"""Prefix language modelling: predict the end of a text from its beginning, which is seen as a whole."""

import torch
from torch import Tensor, nn

from fastlm.models.heads import Factors
from fastlm.objectives.base import IGNORED, Batch
from fastlm.objectives.causal import Causal
from fastlm.objectives.noise import Samples


class Prefix(Causal, name="prefix"):
    """Predict each next token after a prefix, whose tokens see one another (Raffel et al. 2020, sec. 3.2.1).

    Of a row's L + 1 tokens the first n are the prefix, n drawn evenly from 1 to L; the others are targets. A batch has
    inputs and labels as in `Causal`, the labels inside the prefix IGNORED, and prefix [B], n; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`.

    Raises:
        ValueError: if the stream is too short for a single row.
    """

    reports_bits_per_byte = False
    continues = False

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        prefix = 1 + samples.draw(1).expand(len(rows), -1) % self.context
        batch = super().make(rows, samples)
        known = 1 + torch.arange(self.context) < prefix  # the label at place i is token i + 1
        return batch | {"labels": batch["labels"].masked_fill(known, IGNORED), "prefix": prefix.squeeze(1)}

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        return model.head.factors(model.states(batch["inputs"], prefix=batch["prefix"]))

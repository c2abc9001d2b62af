"""Causal language modelling: predict each next token."""

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models.heads import Factors
from fastlm.objectives.base import Batch, Decode
from fastlm.objectives.noise import Samples
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary


class Causal(RowObjective, name="causal"):
    """Predict each next token (maximum likelihood): -Σ log p(xᵢ | x<ᵢ), in nats.

    A batch has inputs and labels, [B, L] int64, labels one token ahead. Rows are windows of a stream in which <eos>
    separates documents, as for GPT-3 (Brown et al. 2020).

    Args:
        tokens, context, vocabulary: as in `Objective`.
        streams: as in `RowObjective`.

    Raises:
        ValueError: if the stream is too short for a single row, or for so many streams.
    """

    reports_bits_per_byte = True
    continues = True

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, streams: int | None = None):
        # each row starts where the one before has its last target
        super().__init__(tokens, context, vocabulary, length=context + 1, overlap=1, streams=streams)

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        # tensors of their own: others may mark labels IGNORED
        return {"inputs": rows[:, :-1].clone(), "labels": rows[:, 1:].clone()}

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        return model.head.factors(model.states(batch["inputs"]))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """n tokens that the model makes of nothing, at temperature 0.8."""
        start = torch.full((1, 1), self.vocabulary.eos, device=generator.device)
        return decode(model.generate(start, n, 0.8, generator)[0, 1:].tolist())

"""Causal language modelling: predict each next token."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.objectives.base import IGNORED, Batch, Decode, Objective, Vocabulary
from fastlm.objectives.windows import Windows


class Causal(Objective, name="causal"):
    """Predict each next token (maximum likelihood): -Σ log p(xᵢ | x<ᵢ), in nats.

    A batch has inputs and labels, [B, L] int64, labels one token ahead. Rows are windows of a stream in which <eos>
    separates documents, as for GPT-3 (Brown et al. 2020).

    Args:
        tokens, context, vocabulary: as in `Objective`.

    Raises:
        ValueError: if the stream is too short for a single row.
    """

    reports_bits_per_byte = True

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary):
        super().__init__(tokens, context, vocabulary)
        self._windows = Windows(tokens, context + 1, overlap=1)  # each starts where the one before has its last target

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def windows(self) -> int:
        return self._windows.count

    def batch(self, seed: int, first: int, count: int) -> Batch:
        return _split(self._windows.drawn(seed, first, count)[0])

    def fixed(self, numbers: np.ndarray) -> Batch:
        return _split(self._windows.fixed(numbers))

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["inputs"]).float()
        labels = batch["labels"].flatten()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")}

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """n tokens that the model makes of nothing, at temperature 0.8."""
        start = torch.full((1, 1), self.vocabulary.eos, device=generator.device)
        return decode(model.generate(start, n, 0.8, generator)[0, 1:].tolist())


def _split(rows: Tensor) -> Batch:
    # tensors of their own: others may mark labels IGNORED
    return {"inputs": rows[:, :-1].clone(), "labels": rows[:, 1:].clone()}

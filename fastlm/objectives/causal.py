"""Causal language modelling: predict each next token."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.objectives import noise
from fastlm.objectives.base import IGNORED, Batch, Objective


class Causal(Objective, name="causal"):
    """Predict each next token (maximum likelihood): -Σ log p(xᵢ | x<ᵢ), in nats.

    A batch has inputs and labels, [B, L] int64, labels one token ahead. Rows are windows of a stream in which <eos>
    separates documents, as for GPT-3 (Brown et al. 2020). Windows of an epoch do not overlap, and each epoch cuts the
    stream at other places.

    Args:
        tokens: [N] ids, as in `Objective`.
        context: tokens of a row, L.

    Raises:
        ValueError: if the stream is too short for a single row.
    """

    reports_bits_per_byte = True

    def __init__(self, tokens: np.ndarray, context: int):
        super().__init__(tokens, context)
        self._order: tuple[tuple[int, int], np.ndarray] | None = None  # the last (seed, epoch) and its windows' starts

    def __len__(self) -> int:
        return max(1, self.windows - 1)  # one fewer than fit, which leaves room to shift

    @property
    def windows(self) -> int:
        """Windows of context + 1 tokens in the stream, each starting where the one before has its last target."""
        return (len(self.tokens) - 1) // self.context

    def batch(self, seed: int, first: int, count: int) -> Batch:
        starts = [self._starts(seed, s // len(self))[s % len(self)] for s in range(first, first + count)]
        return self._cut(np.array(starts))

    def fixed(self, numbers: np.ndarray) -> Batch:
        return self._cut(numbers * self.context)

    def targets(self, batch: Batch) -> dict[str, int]:
        return {"loss": int((batch["labels"] != IGNORED).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["inputs"]).float()
        return {
            "loss": F.cross_entropy(
                logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
            )
        }

    def _starts(self, seed: int, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != (seed, epoch):
            room = len(self.tokens) - len(self) * self.context
            shift = noise.number(seed, noise.Purpose.SHIFT, epoch) % room
            self._order = (seed, epoch), shift + self.context * noise.permutation(seed, epoch, len(self)).numpy()
        return self._order[1]

    def _cut(self, starts: np.ndarray) -> Batch:
        rows = torch.from_numpy(np.asarray(self.tokens)[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        # of their own: others may mark labels IGNORED
        return {"inputs": rows[:, :-1].clone(), "labels": rows[:, 1:].clone()}

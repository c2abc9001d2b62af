"""What a model is trained to do: each objective makes batches and turns a model's answer into sums of loss.

A batch is a pure function of the seed and the numbers of its samples: sample s of n in the data is sample s mod n of epoch
s div n. A loss is one sum per term, kept apart from its number of targets, so that the trainer can divide by the targets of
the whole step however it was cut into micro-batches; averaging inside a micro-batch would be wrong where counts differ.

To add an objective, subclass `Objective` with a name and define its methods; the trainer and the command line find it here.
"""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import noise
from fastlm.words import Refusal

OBJECTIVES: dict[str, type["Objective"]] = {}
IGNORED = -100  # a label that is no target, as in torch.nn.functional.cross_entropy

Batch = dict[str, Tensor]


class Objective:
    """An objective over one stream of ids. tokens [N]; context: tokens a row gives the model.

    Raises Refusal if the stream is too short for a single row.
    """

    name: ClassVar[str]
    compresses: ClassVar[bool] = False  # the loss is a code length of the text: bits per byte mean something

    def __init_subclass__(cls, name: str, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.name = name
        OBJECTIVES[name] = cls

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context
        if len(tokens) < context + 1:
            raise Refusal(f"{len(tokens)} tokens, fewer than one row of {context} + 1; give more text or a smaller --context")

    def __len__(self) -> int:
        """Samples in an epoch."""
        raise NotImplementedError

    @property
    def windows(self) -> int:
        """How many `fixed` windows there are."""
        raise NotImplementedError

    def batch(self, seed: int, first: int, count: int) -> Batch:
        """Samples first … first + count - 1 of the training order."""
        raise NotImplementedError

    def fixed(self, numbers: np.ndarray) -> Batch:
        """The windows with these numbers in the text's order, the same at every evaluation."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> dict[str, int]:
        """Term → how many targets the batch has."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Term → loss summed over its targets, an fp32 scalar."""
        raise NotImplementedError


class Causal(Objective, name="causal"):
    """Predict each next token (maximum likelihood): -Σ log p(xᵢ | x<ᵢ). Batch: inputs, labels [B, L] int64, labels one ahead.

    Rows are windows of a stream in which <eos> separates documents, as for GPT-3. Windows of an epoch do not overlap, and
    each epoch cuts the stream at other places.
    """

    compresses = True

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
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")}

    def _starts(self, seed: int, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != (seed, epoch):
            room = len(self.tokens) - len(self) * self.context
            shift = noise.number(seed, noise.Purpose.SHIFT, epoch) % room
            self._order = (seed, epoch), shift + self.context * noise.permutation(seed, epoch, len(self)).numpy()
        return self._order[1]

    def _cut(self, starts: np.ndarray) -> Batch:
        rows = torch.from_numpy(np.asarray(self.tokens)[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        return {"inputs": rows[:, :-1].clone(), "labels": rows[:, 1:].clone()}  # of their own: others may mark labels IGNORED

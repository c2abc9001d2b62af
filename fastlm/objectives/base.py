"""What an objective is: it makes batches, and turns a model's answer into sums of loss; OBJECTIVES has each by its
name.

A batch is a pure function of the seed and the numbers of its samples: sample s of n in the data is sample s mod n of
epoch s div n. A loss is one sum per term, kept apart from its number of targets, so that the trainer can divide by the
targets of the whole step however it was cut into micro-batches; averaging inside a micro-batch would be wrong where
counts differ."""

from typing import ClassVar

import numpy as np
from torch import Tensor, nn

OBJECTIVES: dict[str, type["Objective"]] = {}
IGNORED = -100  # a label that is no target, as in torch.nn.functional.cross_entropy
Batch = dict[str, Tensor]


class Objective:
    """An objective over one stream of ids. tokens [N]; context: tokens a row gives the model.

    Raises ValueError if the stream is too short for a single row.
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
            raise ValueError(
                f"{len(tokens)} tokens, fewer than one row of {context} + 1; give more text or a smaller --context"
            )

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

"""A model's loss over text it did not learn from: on the way through a run, and for `fastlm evaluate`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models import Recurrence, Remembering
from fastlm.objectives import Objective
from fastlm.objectives.base import placed
from fastlm.trainer.distributed.ranks import ALONE, Ranks
from fastlm.trainer.options.training import DTYPES


@dataclass
class Evaluation:
    """What looks at text.

    Args:
        objective: over the text.
        batch: windows at a time.
        device: the model's.
        dtype: of matrix products, a name of DTYPES.
        bytes_of: [V] int64, bytes of text that each id stands for; None where the loss is no code length.
        remembers: whether the model remembers the windows before.
        check: called before each batch; what it raises ends the evaluation.
        ask: (question, model, batch) → question(model, batch); where a model is divided, all ranks together.
        ranks: the processes, each of which looks at a part of every batch.
    """

    objective: Objective
    batch: int
    device: torch.device
    dtype: str = "fp32"
    bytes_of: Tensor | None = None
    remembers: bool = False
    check: Callable[[], None] = lambda: None
    ask: Callable[..., Any] = lambda question, model, *args: question(model, *args)
    ranks: Ranks = ALONE

    @torch.no_grad()
    def of(self, model: nn.Module, windows: int | None = None) -> dict[str, float]:
        """ "loss", its terms, the objective's shares, and "bits_per_byte" where its loss is a code length; over all
        windows, or over so many of them spread evenly, always the same.
        """
        model.eval()
        sums, counts = self._sums(model, windows or self.objective.windows)
        sums, counts = self.ranks.sums(sums), self.ranks.total(counts)
        terms = {name: value.item() for name, value in sums.items() if value.ndim == 0}
        found = self.objective.means(terms, counts)
        found |= {name: self.objective.measure(name, value) for name, value in sums.items() if value.ndim}
        if self.bytes_of is not None:
            found["bits_per_byte"] = sum(terms.values()) / math.log(2) / counts["bytes"]
        return found

    def _sums(self, model: nn.Module, windows: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        """This rank's part of so many windows: terms and shares summed, in fp64; targets, and "bytes" of text."""
        # in place: a scalar kept from each batch would lie in the heap where the next batch's logits have to fit
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for asked, numbers in self._looked_at(model, windows):
            self.check()
            mine = numbers[self.ranks.part(len(numbers))]
            batch = self.objective.fixed(mine if len(mine) else numbers[:1])  # every rank asks the model each time
            with autocast(self.dtype, self.device):
                terms, shares = self.ask(self.objective.evaluate, asked, placed(batch, self.device))
            there = self.objective.targets(batch)
            if self.bytes_of is not None:
                there["bytes"] = self.bytes_of[batch["labels"].clamp(min=0)].sum().item()
            for name, value in (terms | {name: torch.stack(share) for name, share in shares.items()}).items():
                if name not in sums:
                    sums[name] = torch.zeros_like(value, dtype=torch.float64)
                if len(mine):
                    sums[name] += value
            counts = total([counts, there if len(mine) else dict.fromkeys(there, 0)])
        return sums, counts

    def _looked_at(self, model: nn.Module, windows: int) -> Iterator[tuple[nn.Module, np.ndarray]]:
        """Batches of so many windows, by their numbers, and the model that looks at them: windows spread evenly, or,
        for one that remembers, stretches of the text, each in a row of the batches from its beginning on.
        """
        there, batch = self.objective.windows, self.batch
        if not self.remembers:
            numbers = np.arange(windows) * there // windows
            yield from ((model, numbers[first : first + batch]) for first in range(0, windows, batch))
            return
        # all of a window is remembered, whatever the model's memory_reuse: the next one begins where it ends
        remembering = Remembering(model, Recurrence(model.config.memory))
        rows = np.arange(min(batch, windows) + 1)
        begins, lengths = rows[:-1] * there // rows[-1], np.diff(rows * windows // rows[-1])
        order = np.argsort(-lengths, kind="stable")  # those that end first come last
        for step in range(lengths.max()):
            going_on = order[lengths[order] > step]
            remembering.recurrence.reorder(torch.arange(len(going_on), device=self.device))
            yield remembering, begins[going_on] + step


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Matrix products in a dtype of DTYPES."""
    named = getattr(torch, DTYPES[dtype])
    return torch.autocast(device.type, named, enabled=named is not torch.float32)


def total(rows: list[dict]) -> dict:
    """Sum dicts key by key; a key may be missing from some."""
    sums: dict = {}
    for row in rows:
        for name, value in row.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums

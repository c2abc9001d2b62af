"""Spans: where in a text the answer to a question stands, as in SQuAD (Rajpurkar et al. 2016)."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import ModelConfig, Transformer
from fastlm.models.heads import SpanReader
from fastlm.objectives import IGNORED, Batch, Shares, Terms
from fastlm.objectives.base import summed_cross_entropy
from fastlm.trainer.tasks.layout import Layout
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.tasks.task import Baseline, Example, Head, Task

LONGEST = 30  # ids of an answer at most, as in BERT's code


class Spans(Task, name="spans"):
    """Say where the answer begins and where it ends: -½ log p(first id | row) - ½ log p(last id | row), in nats.

    A row is the question and the context. The places are those of the context's ids; no other one can be said. A batch
    has inputs, real and types as in `Layout.batch`, context [B, L] bool, the places that can be said, and first and
    last [B] int64, IGNORED where the answer was left out with what was too long.

    Args:
        examples, context, vocabulary, shape, head: as in `Task`.
    """

    shares = ("exact_match", "f1")

    @staticmethod
    def encode(row: Row, layout: Layout, head: Head, encoding: Callable) -> Example:
        (question, _), (context, places) = encoding(row.first), encoding(row.second)
        made, end = layout.row(question, context), row.start + len(row.answer)
        inside = [i for i, (begin, stop) in enumerate(places) if begin < end and stop > row.start]
        kept = len(made.ids) - made.second - 1 - len(layout.back)
        if not inside or inside[-1] >= kept:
            return Example(made, None, row, places[:kept])
        return Example(made, (inside[0], inside[-1]), row, places[:kept])

    @staticmethod
    def baseline(train: Sequence[Example], held_out: Sequence[Example], head: Head) -> Baseline:
        known = [example for example in held_out if example.target is not None]
        loss = sum(math.log(len(example.places)) for example in known) / max(1, len(known))
        return Baseline("any place alike", loss)

    def model(self, config: ModelConfig) -> nn.Module:
        return SpanReader(Transformer(config))

    def make(self, examples: list[Example]) -> Batch:
        batch = self.layout.batch([e.row for e in examples])
        longest = batch["inputs"].shape[1]
        context = torch.zeros_like(batch["real"])
        first, last = torch.full((2, len(examples)), IGNORED)
        for i, example in enumerate(examples):
            begin = example.row.second + (longest - len(example.row.ids) if self.layout.left else 0)
            context[i, begin : begin + len(example.places)] = True
            if example.target is not None:
                first[i], last[i] = (begin + place for place in example.target)
        return batch | {"context": context, "first": first, "last": last}

    def targets(self, batch: Batch) -> dict[str, int]:
        return {"loss": int((batch["first"] != IGNORED).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return {"loss": self._loss(self._logits(model, batch), batch)}

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        logits = self._logits(model, batch)
        examples = [self.examples[i] for i in batch["examples"].tolist()]
        found = list(zip(self._said(logits, batch, examples), (e.said.answer for e in examples), strict=True))
        scores = [(float(normal(said) == normal(true)), f1(said, true)) for said, true in found]
        exact, overlap = torch.tensor(scores, device=batch["first"].device).sum(0)
        n = torch.full_like(exact, len(examples))
        return {"loss": self._loss(logits, batch)}, {"exact_match": (exact, n), "f1": (overlap, n)}

    def answers(self, model: nn.Module, batch: Batch, examples: list[Example], decode: Callable) -> list[str]:
        return self._said(self._logits(model, batch), batch, examples)

    def _logits(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """[B, L] each, of the first place and of the last."""
        return [x.float().masked_fill(~batch["context"], -torch.inf) for x in self.read(model, batch)]

    def _loss(self, logits: list[Tensor], batch: Batch) -> Tensor:
        return sum(summed_cross_entropy(x, batch[name]) for x, name in zip(logits, ("first", "last"), strict=True)) / 2

    def _said(self, logits: list[Tensor], batch: Batch, examples: list[Example]) -> list[str]:
        """The likeliest span of at most LONGEST ids."""
        first, last = (x.log_softmax(-1) for x in logits)
        length = first.shape[1]
        spans = [first[:, : length - n] + last[:, n:] for n in range(min(LONGEST, length))]  # of n more ids than one
        scores = torch.stack([F.pad(x, (0, length - x.shape[1]), value=-torch.inf) for x in spans], 1)
        best = scores.nan_to_num(-torch.inf, neginf=-torch.inf).flatten(1).argmax(-1)
        begins = batch["context"].int().argmax(1)
        said = []
        for at, begin, example in zip(best.tolist(), begins.tolist(), examples, strict=True):
            start = at % length - begin
            end = start + at // length
            there = 0 <= start <= end < len(example.places)
            said.append(example.said.second[example.places[start][0] : example.places[end][1]].strip() if there else "")
        return said


def normal(answer: str) -> str:
    """Lower case, without punctuation, articles and more than one space, as SQuAD's evaluation has it."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def f1(said: str, true: str) -> float:
    """Of the words that two answers share, as SQuAD's evaluation has it."""
    a, b = normal(said).split(), normal(true).split()
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b))

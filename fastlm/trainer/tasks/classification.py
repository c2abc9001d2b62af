"""Classification: which of some labels a text has, or a pair of texts."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastlm.models import ModelConfig, Transformer
from fastlm.models.heads import RowClassifier
from fastlm.objectives import Batch, Shares, Terms, Vocabulary
from fastlm.objectives.base import hits, summed_cross_entropy
from fastlm.trainer.tasks.layout import Layout
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.tasks.task import Baseline, Example, Head, Task


class Classification(Task, name="classification"):
    """Say which label a row has: -log p(label | row), in nats.

    A batch has inputs, real and types as in `Layout.batch`, and labels [B] int64. Where there are two labels, F1 of the
    second one is counted besides.

    Args:
        examples, context, vocabulary, shape, head: as in `Task`.
    """

    def __init__(
        self, examples: Sequence[Example], context: int, vocabulary: Vocabulary, shape: ModelConfig, head: Head
    ):
        super().__init__(examples, context, vocabulary, shape, head)
        self.shares = ("accuracy", *(("f1",) if len(head.labels) == 2 else ()))

    @staticmethod
    def encode(row: Row, layout: Layout, head: Head, encoding: Callable) -> Example:
        if row.answer not in head.labels:
            raise ValueError("a label that no row of the train side has")
        second = None if row.second is None else encoding(row.second)[0]
        return Example(layout.row(encoding(row.first)[0], second), head.labels.index(row.answer), row)

    @staticmethod
    def baseline(train: Sequence[Example], held_out: Sequence[Example], head: Head) -> Baseline:
        counts = Counter(example.target for example in train)
        total = len(train) + len(head.labels)  # plus one each
        loss = -sum(math.log((counts[example.target] + 1) / total) for example in held_out) / len(held_out)
        most = max(range(len(head.labels)), key=counts.get)
        share = sum(example.target == most for example in held_out) / len(held_out)
        return Baseline("label frequencies", loss, "accuracy", share, f"always {head.labels[most]!r}")

    def model(self, config: ModelConfig) -> nn.Module:
        return classifier(config, len(self.head.labels), self.head.pooling, self.end)

    def entries(self) -> dict:
        labels = dict(enumerate(self.head.labels))
        return {
            "id2label": labels,
            "label2id": {label: i for i, label in labels.items()},
            "problem_type": "single_label_classification",
        }

    def make(self, examples: list[Example]) -> Batch:
        return self.layout.batch([e.row for e in examples]) | {"labels": torch.tensor([e.target for e in examples])}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return {"loss": summed_cross_entropy(self.read(model, batch), batch["labels"])}

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        logits, labels = self.read(model, batch), batch["labels"]
        shares: Shares = {"accuracy": hits(logits, labels)}
        if "f1" in self.shares:
            said, true = logits.argmax(-1) == 1, labels == 1
            shares["f1"] = 2 * (said & true).sum(), said.sum() + true.sum()
        return {"loss": summed_cross_entropy(logits, labels)}, shares

    def answers(self, model: nn.Module, batch: Batch, examples: list[Example], decode: Callable) -> list[str]:
        return [self.head.labels[i] for i in self.read(model, batch).argmax(-1).tolist()]


def classifier(config: ModelConfig, labels: int, pooling: str, end: int) -> RowClassifier:
    """A new model with a head for rows."""
    return RowClassifier(Transformer(config), labels, pooling, end=end if pooling == "bart" else None)

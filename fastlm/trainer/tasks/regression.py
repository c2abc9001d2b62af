"""Regression: which number a text has, or a pair of texts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastlm.models import ModelConfig
from fastlm.objectives import Batch, Shares, Terms
from fastlm.trainer.tasks.classification import classifier
from fastlm.trainer.tasks.layout import Layout
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.tasks.task import Baseline, Example, Head, Task


class Regression(Task, name="regression"):
    """Say which number a row has: (said - number)², as transformers does with one label.

    A batch has inputs, real and types as in `Layout.batch`, and values [B] fp32, the numbers. The correlation
    of what is said with these is Pearson's.

    Args:
        examples, context, vocabulary, shape, head: as in `Task`.
    """

    unit = "squared error"
    shares = ("pearson",)

    @staticmethod
    def encode(row: Row, layout: Layout, head: Head, encoding: Callable) -> Example:
        second = None if row.second is None else encoding(row.second)[0]
        return Example(layout.row(encoding(row.first)[0], second), float(row.answer), row)

    @staticmethod
    def baseline(train: Sequence[Example], held_out: Sequence[Example], head: Head) -> Baseline:
        mean = sum(example.target for example in train) / len(train)
        loss = sum((example.target - mean) ** 2 for example in held_out) / len(held_out)
        return Baseline(f"always {mean:.3g}, the mean", loss)

    def model(self, config: ModelConfig) -> nn.Module:
        return classifier(config, 1, self.head.pooling, self.end)

    def entries(self) -> dict:
        return {"id2label": {0: "number"}, "label2id": {"number": 0}, "problem_type": "regression"}

    def make(self, examples: list[Example]) -> Batch:
        return self.layout.batch([e.row for e in examples]) | {"values": torch.tensor([e.target for e in examples])}

    def targets(self, batch: Batch) -> dict[str, int]:
        return {"loss": len(batch["values"])}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return {"loss": (self._said(model, batch) - batch["values"]).square().sum()}

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        said, true = self._said(model, batch), batch["values"]
        x, y = said.double(), true.double()
        sums = (torch.ones_like(x).sum(), x.sum(), y.sum(), x.square().sum(), y.square().sum(), (x * y).sum())
        return {"loss": (said - true).square().sum()}, {"pearson": sums}

    def measure(self, name: str, sums: Tensor) -> float:
        n, x, y, xx, yy, xy = sums
        scale = ((n * xx - x * x) * (n * yy - y * y)).clamp(min=0).sqrt()
        return ((n * xy - x * y) / scale).item() if scale > 0 else 0.0  # one that says the same of all has none

    def worded(self, name: str, value: float) -> str:
        return f"{value:.3f}"

    def answers(self, model: nn.Module, batch: Batch, examples: list[Example], decode: Callable) -> list[str]:
        return [f"{said:.4g}" for said in self._said(model, batch).tolist()]

    def _said(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.read(model, batch).float().squeeze(-1)

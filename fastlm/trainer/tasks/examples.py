"""Two sides of a task: rows as a model reads them, what was not taken, and what a result on them is compared with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from fastlm.models import ModelConfig
from fastlm.objectives import Objective, Vocabulary
from fastlm.objectives.samples import permutation
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.options.finetune import FineTune
from fastlm.trainer.tasks.layout import Layout
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.tasks.task import Baseline, Example, Head, Task
from fastlm.trainer.words import several

Encoding = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
SHOWN = 20  # labels in the report
HELD_OUT = 0.1  # of the groups of rows


class Facts(NamedTuple):
    vocab_size: int


@dataclass(frozen=True)
class Examples:
    """The `Material` of fine-tuning, and the sides that a Trainer takes.

    Args:
        name: what the rows are called.
        task: what is made of them; head: how they are read.
        train, held_out: examples.
        fingerprint: SHA-256 of all rows and of which were held out.
        split: which those are, in words.
        skipped: what was not taken.
        tokenizer_file: of their ids.
        facts: of those.
    """

    name: str
    task: type[Task]
    head: Head
    train: list[Example]
    held_out: list[Example]
    fingerprint: str
    split: str
    skipped: Skipped
    tokenizer_file: Path
    facts: Facts

    @property
    def sides(self) -> "Examples":
        return self

    @cached_property
    def baseline(self) -> Baseline:
        return self.task.baseline(self.train, self.held_out, self.head)

    @property
    def cut(self) -> int:
        """How many rows were longer than the model reads."""
        return sum(example.row.cut > 0 for example in (*self.train, *self.held_out))

    @property
    def lost(self) -> int:
        """How many rows lost their answer with that."""
        return sum(example.target is None for example in (*self.train, *self.held_out))

    def epochs(self, rows: int, context: int) -> float:
        return rows / len(self.train)

    def references(self) -> dict[str, float]:
        return {self.baseline.guess: self.baseline.loss}

    def to_beat(self) -> tuple[str, ...]:
        loss = f"{self.baseline.guess} {self.baseline.loss:.3f} {self.task.unit}"
        return (loss, *([self.beside()] if self.baseline.share else []))

    def beside(self) -> str:
        b = self.baseline
        if b.share is None:
            return f"{b.guess} {b.loss:.3f} {self.task.unit}"
        return f"{b.constant} {b.share.replace('_', ' ')} {b.value:.1%}"

    def result(self) -> dict[str, str]:
        b = self.baseline
        rows = {b.guess: f"{b.loss:.4f} {self.task.unit} per {self.task.per}"}
        return rows | ({f"{b.constant}: {b.share}": f"{b.value:.1%}"} if b.share else {})

    def described(self) -> dict[str, str | None]:
        labels = self.head.labels
        return {
            "rows": f"{self.name}: {len(self.train):,} to train on, {len(self.held_out):,} held out",
            "kind": self.task.name,
            "labels": f"{len(labels)}: {', '.join(labels[:SHOWN])}{', …' * (len(labels) > SHOWN)}" if labels else None,
            "skipped": "; ".join(self.skipped.lines()) or None,
            "cut": f"{several(self.cut, 'row')} longer than the model reads" if self.cut else None,
            "SHA-256": self.fingerprint,
            "split": self.split,
        }

    def failure(self, objective: Objective, last: dict) -> tuple[str, str] | None:
        """Neither the loss nor the share is better than what has learned nothing reaches."""
        b, loss = self.baseline, last["held_out_loss"]
        if loss < b.loss or (b.share and last[f"held_out_{b.share}"] > b.value):
            return None
        short = f"the held-out loss {loss:.3f} is not below that of {b.guess}, {b.loss:.3f}"
        return short, "the model learned nothing of the rows; try another --lr, or more --epochs"


def sides_of(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and a tenth that a seed draws: rows whose texts are the same, or that are of one group, are
    on one side.
    """
    groups = list(dict.fromkeys(row.together for row in rows))
    order = permutation(seed, 0, len(groups)).tolist()
    held = {groups[i] for i in order[: max(1, round(HELD_OUT * len(groups)))]}
    return [row for row in rows if row.together not in held], [row for row in rows if row.together in held]


def encoded(
    rows: list[Row], config: FineTune, known: Vocabulary, encoding: Encoding, tell: Callable[[str, str], None]
) -> list[Example]:
    """The examples of rows; tell: of each that is not taken it is told the reason, and the row."""
    head, task = config.head(), config.task_class()
    layout = Layout.of(config.model(known.size), head.pooling, known)
    made = []
    for row in rows:
        try:
            made.append(task.encode(row, layout, head, encoding))
        except ValueError as error:
            tell(str(error), repr(row.answer[:40]))
    return made


def encoding_of(tokenizer: Tokenizer) -> Encoding:
    """What makes ids of a text, and tells where each begins and ends in it."""

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        made = tokenizer.encode(text, add_special_tokens=False)
        return made.ids, made.offsets

    return encode


def fingerprint(train: list[Row], held_out: list[Row]) -> str:
    """SHA-256 of the rows, in their order, on their sides."""
    digest = hashlib.sha256()
    for side in (train, held_out):
        for row in side:
            digest.update(repr(tuple(row)).encode(errors="surrogatepass") + b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


def longest(config: FineTune, known: Vocabulary) -> Example:
    """A row that is as long as the model reads, for reckoning."""
    shape = ModelConfig(**config.shape)
    layout = Layout.of(shape, config.head().pooling, known)
    text = [known.specials] * shape.context
    encoding = lambda text_: (text, [(i, i + 1) for i in range(len(text))])
    label = config.labels[0] if config.labels else "0"
    return config.task_class().encode(Row("x", "x", label), layout, config.head(), encoding)

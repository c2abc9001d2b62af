"""Everything `fastlm finetune` can be asked for: a dataclass from which its flags are made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Suppress

from fastlm.trainer.data.tokenizer import bare_vocabulary
from fastlm.trainer.options.choices import choices
from fastlm.trainer.options.folders import check_folder
from fastlm.trainer.options.training import DECAY, LR, OTHER_LR, TUPLES, Training, unset
from fastlm.trainer.words import Refusal, absent

if TYPE_CHECKING:  # torch takes seconds, for which a mistyped flag need not wait
    from fastlm.models import ModelConfig
    from fastlm.objectives import Vocabulary
    from fastlm.trainer.tasks import Task

PEAK, WIDTH = 3e-5, 768  # of the rates that Devlin et al. 2019 (app. A.3) choose from, and of BERT-base
OTHER_DECAY = 0.01


@dataclass(frozen=True)
class Asked:
    """The part of a configuration that says what is fine-tuned, and on what."""

    folder: Path
    """A run's folder, or one that transformers can open, with a tokenizer.json of fastlm's."""
    task: Annotated[Path | None, unset("FILE", "whether lines of Python's library are code, comment or docstring")] = (
        None
    )
    """Labelled rows, a .jsonl, .json, .csv or .tsv, each also as .gz; the columns say what is learned: text and label,
    with text_pair for pairs; text, context, answer and start; or source and target."""
    kind: Annotated[Literal[("columns", *choices("kind"))], unset(None, "as the columns say")] = "columns"
    """What is learned of the rows; labels are numbers in a regression if one of them is written with a point."""
    held_out: Annotated[Path | None, unset("FILE", "a tenth of the rows, drawn by --seed")] = None
    """Rows to judge by, of the same columns."""
    epochs: float = 3.0
    """How often each row is learned from."""
    order: Literal["random", "by-length"] = "random"
    """How rows come together: as they are drawn, or those of a batch about as long as one another, which saves
    padding."""
    max_tokens: Annotated[int | None, unset("INT", "--batch rows, however long")] = None
    """Ids of a micro-batch with its padding, at most: the rows of an update are sorted by length and cut into as many
    micro-batches as that takes, which saves padding and memory and leaves what is learned as it is."""


@dataclass(frozen=True)
class FineTune(Training, Asked):
    """Fine-tune a trained model on labelled rows. Without --task: on whether lines of Python's library are code, a
    comment or a docstring."""

    command: ClassVar[str] = "finetune"
    at_least: ClassVar[dict[str, float]] = Training.at_least | {"epochs": 0, "max_tokens": 1}

    steps: Annotated[int | None, unset("INT", "as many as the epochs take")] = None
    """Train for exactly this many updates, whatever the epochs."""
    batch: int = 16
    """Rows in a micro-batch."""
    lr: Annotated[float | None, unset("FLOAT", f"{PEAK:g} times {WIDTH} / the model's width, squared")] = None
    """Peak learning rate; that default is adamw's, and other optimizers have theirs in proportion."""
    schedule: Literal[choices("schedule")] = "linear"
    """How the rate falls after its peak."""
    warmup: float = 0.1
    """Share of the steps on which the rate climbs."""
    min_lr_ratio: float = 0.0
    """Share of the peak rate at which the schedule ends."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How much of the last means of gradients and of their squares Adam's kind keeps at each step."""
    weight_decay: Annotated[float | None, unset("FLOAT", f"{OTHER_DECAY:g}; 0 for {' and '.join(DECAY)}")] = None
    """How strongly weights are drawn to zero."""
    dropout: Annotated[float | None, unset("FLOAT", "the model's")] = None
    """Share of activations left out in training."""
    evaluations: int = 4
    """How often to look at held-out rows; at each quarter in any case."""
    labels: Suppress[tuple[str, ...]] = ()
    """No flag: the labels that the rows have, in their order."""

    @property
    def source(self) -> Path:
        """The folder whose weights a run begins with."""
        return self.folder

    @property
    def tokens_at_once(self) -> int | None:
        return self.max_tokens

    @property
    def named(self) -> str:
        """What the model is called."""
        return self.folder.name

    def model(self, vocab_size: int) -> "ModelConfig":
        """The folder's shape with this run's changes."""
        from fastlm.models import ModelConfig

        found = ModelConfig(**self.shape)
        dropout = {} if self.dropout is None else {"dropout": self.dropout}
        return replace(found, **self.task_class().shape_of(found) | dropout)

    def task_class(self) -> "type[Task]":
        from fastlm.trainer.tasks import TASKS

        return TASKS[self.kind]

    def head(self) -> tuple:
        """How rows are read: what a `Task` calls a Head."""
        from fastlm.interop.heads import pooling_of
        from fastlm.models import ModelConfig
        from fastlm.trainer.tasks.task import Head

        return Head(pooling_of(ModelConfig(**self.shape)), self.labels)

    def objective_over(
        self, examples: Sequence, context: int, known: "Vocabulary", streams: int | None = None
    ) -> "Task":
        """The task over one side of the rows. Raises ValueError if there are none."""
        task = self.task_class()(examples, context, known, self.model(known.size), self.head())
        if self.order == "by-length":
            task.order_by_length(self.batch)
        return task

    def objective_on_rows(self, context: int, vocab_size: int) -> "Task":
        """The task over one row that is as long as the model reads."""
        from fastlm.trainer.tasks.examples import longest

        known = bare_vocabulary(vocab_size)
        return self.objective_over([longest(self, known)], context, known)

    def settled(self) -> "FineTune":
        """The same with what the machine, the folder or another flag decides written out."""
        width = self.shape["dim"]
        lr = PEAK * (WIDTH / width) ** 2 * LR.get(self.optimizer, OTHER_LR) / LR["adamw"]
        optimizer = {"lr": lr, "weight_decay": DECAY.get(self.optimizer, OTHER_DECAY)}
        optimizer = {name: value for name, value in optimizer.items() if getattr(self, name) is None}
        paths = {name: (path := getattr(self, name)) and path.resolve() for name in ("folder", "task", "held_out")}
        return replace(self, **self.settled_paths(), **paths, **optimizer)

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values no run can have."""
        self.check_values()
        self.check_machine()

    def check_values(self) -> None:
        super().check_values()
        if self.epochs == 0:
            raise Refusal("--epochs is 0; it must be above 0")
        if self.shape is not None:  # a run that has begun needs the folder no more
            return
        check_folder(self.folder)
        for name, path in (("--task", self.task), ("--held-out", self.held_out)):
            if path is not None and not path.exists():
                raise Refusal(f"{name} {absent(path, 'give a file of labelled rows')}")
        if self.held_out is not None and self.task is None:
            raise Refusal(f"--held-out {self.held_out} is given without --task; give both")

    @classmethod
    def from_json(cls, values: dict) -> "FineTune":
        """The configuration that `to_json` was of."""
        paths = {name: values[name] and Path(values[name]) for name in ("folder", "task", "held_out", "out")}
        values = {name: value for name, value in values.items() if name != "command"}
        return cls(**values | paths | {name: tuple(values[name]) for name in (*TUPLES, "labels") if name in values})

"""What a run learns from, as its loop and its outputs meet it: `data.text.Text`, or a task's `Examples`."""

from typing import Protocol

from fastlm.objectives import Objective
from fastlm.trainer.words import Refusal


class Material(Protocol):
    """Two sides, one of them held out, and what a result on it is compared with.

    Attributes:
        fingerprint: SHA-256 of all of it.
        sides: what a `Trainer` takes: train and held_out, tokenizer_file, and facts with the vocab_size.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def sides(self): ...

    def epochs(self, rows: int, context: int) -> float:
        """How often so many rows of so many tokens go through the train side."""
        ...

    def references(self) -> dict[str, float]:
        """Name → the loss of what has learned nothing: lines in the plot."""
        ...

    def to_beat(self) -> tuple[str, ...]:
        """The same in words, before a run."""
        ...

    def beside(self) -> str:
        """What the result is set beside, after a run."""
        ...

    def result(self) -> dict[str, str]:
        """Rows of the report's first table: what the result is compared with."""
        ...

    def described(self) -> dict[str, str | None]:
        """Rows of the report on the data; a row that is None is left out."""
        ...

    def failure(self, objective: Objective, last: dict) -> tuple[str, str] | None:
        """What the newest metrics fall short of, and what that means with a cure; None where they do not."""
        ...


def check_unchanged(name: str, fingerprint: str, began: str | None) -> None:
    """Raises Refusal if the material is not what a run began with. began: its fingerprint then; None for a new run."""
    if began not in (None, fingerprint):
        now = f"its SHA-256 was {began[:12]} and is {fingerprint[:12]}"
        raise Refusal(f"{name} changed since the run began: {now}; restore it, or start a new run")

"""What the commands that read a run's folder can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastlm.trainer.data.corpus import check_there
from fastlm.trainer.options.training import DTYPES, unset
from fastlm.trainer.words import Refusal, absent, flag, utf8


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted run, exactly where it was."""

    folder: Path
    """The run's folder."""
    plugin: Annotated[tuple[str, ...], unset("MODULE...", "none")] = ()
    """The plugins it was made with."""

    def check(self) -> None:
        """Nothing that is asked for can be wrong."""


@dataclass(frozen=True)
class Sample:
    """Let a trained model write."""

    folder: Path
    """The run's folder."""
    prompt: Annotated[str, unset("TEXT", "the start of a document")] = ""
    """Text to continue."""
    tokens: int = 200
    """How many to write."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: Annotated[int | None, unset("INT", "all tokens")] = None
    """Draw from this many of the likeliest tokens only."""
    top_p: Annotated[float | None, unset("FLOAT", "all tokens")] = None
    """Draw from the likeliest tokens that have this probability together."""
    beams: int = 1
    """Texts kept in a beam search, which draws nothing and shows the likeliest whole; 1 for none."""
    seed: int = 0
    """The same one writes the same text."""
    plugin: Annotated[tuple[str, ...], unset("MODULE...", "none")] = ()
    """The plugins the run was made with."""

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values no sample can have."""
        for name in ("tokens", "top_k", "beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"{flag(name)} is {value}; it must be at least 1")
        if not (self.temperature == 0 or 0.01 <= self.temperature < float("inf")):  # NaN is refused too
            raise Refusal(
                f"--temperature is {self.temperature:g}; it must be 0, for the likeliest token each time, or a number "
                "from 0.01"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise Refusal(f"--top-p is {self.top_p:g}; it is a probability, above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise Refusal(f"--seed is {self.seed}; it must be from 0 to {2**63 - 1}")
        if self.prompt != utf8(self.prompt):
            raise Refusal(f"--prompt {self.prompt} is not UTF-8; give text that is")


@dataclass(frozen=True)
class Predict:
    """Let a fine-tuned model answer."""

    folder: Path
    """The run's folder."""
    file: Path
    """Rows with the columns of the task but for the answer: a .jsonl, .json, .csv or .tsv, each also as .gz."""
    plugin: Annotated[tuple[str, ...], unset("MODULE...", "none")] = ()
    """The plugins the run was made with."""

    def check(self) -> None:
        """Raises Refusal for a file that is not there."""
        if not self.file.exists():
            raise Refusal(absent(self.file, "give a file of rows"))


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model over a text that it did not learn."""

    folder: Path
    """The run's folder, or one that transformers can open."""
    data: Annotated[tuple[Path, ...], unset("PATH...", "the standard library's sources")] = ()
    """Files and folders of .txt, .md, .py, .jsonl, .json, .csv, .tsv, each also as .gz."""
    text_key: str = "text"
    """The field that holds the text in a row of a .jsonl, .json, .csv or .tsv."""
    context: Annotated[int | None, unset("INT", "the model's")] = None
    """Tokens in a window."""
    windows: Annotated[int | None, unset("INT", "all")] = None
    """How many to look at, spread evenly over the text."""
    batch: int = 8
    """Windows at a time."""
    dtype: Literal[tuple(DTYPES)] = "fp32"
    """What matrix products are computed in."""
    plugin: Annotated[tuple[str, ...], unset("MODULE...", "none")] = ()
    """The plugins the run was made with."""

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values no evaluation can have."""
        for name in ("context", "windows", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"{flag(name)} is {value}; it must be at least 1")
        check_there(self.data)


def check_folder(folder: Path, name: str = "") -> None:
    """Raises Refusal for what is no folder. name: the flag that named it, if one did."""
    said = f"{name} " if name else ""
    if not folder.exists():
        raise Refusal(said + absent(folder, "give the folder of a run"))
    if not folder.is_dir():
        raise Refusal(f"{said}{folder} is a file; give the folder of a run")

"""What `fastlm data` can be asked for, a class for each of its commands."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastlm.trainer.data.corpus import check_there
from fastlm.trainer.data.tokenizer import LEAST
from fastlm.trainer.options.training import unset
from fastlm.trainer.words import Refusal, absent, flag


@dataclass(frozen=True)
class Made:
    """What the commands that write a folder have in common."""

    sources: tuple[str, ...]
    """Files, folders, and datasets that were saved to disk, each PATH or NAME=PATH: .txt, .md, .py, .jsonl, .json,
    .csv, .tsv, each also as .gz; .parquet and .arrow."""
    out: Annotated[Path | None, unset("PATH", "none; it has to be given")] = None
    """Folder to write. The same command goes on where it was stopped."""
    text_key: str = "text"
    """The field that holds the text in a row."""
    processes: int = os.cpu_count() or 1
    """How many work at a time. The result does not depend on it."""
    part: float = 64.0
    """Megabytes of text that one of them works on at a time, and that are lost at most when it is stopped."""

    @property
    def part_bytes(self) -> int:
        return max(1, int(self.part * 1e6))

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values that nothing can be made with."""
        if self.out is None:
            raise Refusal("--out is missing; name the folder to write")
        if self.processes < 1:
            raise Refusal(f"--processes is {self.processes}; it must be at least 1")
        if not 0 < self.part < float("inf"):
            raise Refusal(f"--part is {self.part:g}; it must be above 0")


@dataclass(frozen=True)
class Pack(Made):
    """Write text as ids that `fastlm pretrain --data DIR` maps into memory: once, in several processes, and the same
    bit for bit however often it was stopped.
    """

    validation: Annotated[tuple[str, ...], unset("PATH...", "a part of the sources")] = ()
    """Sources that are held out, all of them, instead of a part of each."""
    vocab: int = 2048
    """Size of the byte-level BPE vocabulary that is learned from the text."""
    tokenizer: Annotated[Path | None, unset("PATH", "learned from the text")] = None
    """A tokenizer.json of fastlm's, or a run's folder, to encode by instead."""

    def check(self) -> None:
        super().check()
        if not LEAST <= self.vocab <= 2**32:
            raise Refusal(f"{flag('vocab')} is {self.vocab}; it must be from {LEAST} to {2**32}")
        if self.tokenizer is not None and not self.tokenizer_file.is_file():
            raise Refusal(f"--tokenizer {absent(self.tokenizer_file, 'give a tokenizer.json, or the folder of a run')}")

    @property
    def tokenizer_file(self) -> Path | None:
        found = self.tokenizer
        return found / "tokenizer.json" if found is not None and found.is_dir() else found


@dataclass(frozen=True)
class Inspect:
    """Say what a folder of `fastlm data pack` holds, or a file or folder of text, and whether it is whole."""

    path: Path
    """A folder of `fastlm data pack`, or a source as that takes it."""
    text_key: str = "text"
    """The field that holds the text in a row."""
    seed: int = 0
    """Of the document that is shown."""

    def check(self) -> None:
        """Raises Refusal for a path that is not there."""
        check_there((self.path,), "data inspect")


COMMANDS: dict[str, type] = {"pack": Pack, "inspect": Inspect}

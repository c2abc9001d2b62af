"""What `fastlm data` can be asked for, a class for each of its commands."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastlm.trainer.data.corpus import check_there
from fastlm.trainer.data.tokenizer import LEAST
from fastlm.trainer.options.plugins import hook
from fastlm.trainer.options.training import unset
from fastlm.trainer.words import Refusal, absent, did_you_mean, flag


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
class Clean(Made):
    """Write what of a text is worth learning from, as .jsonl: by C4's rules, without what repeats, and by
    judges of your own; with a report of what was dropped and why.
    """

    without: Annotated[tuple[str, ...], unset("RULE...", "all rules hold")] = ()
    """Rules to leave out: citations, punctuation, words, javascript, policy, lorem, braces, vulgar, sentences; exact,
    near and spans of what repeats."""
    bad_words: Annotated[Path | None, unset("PATH", "none")] = None
    """A file of words, one a line; a document with one of them is dropped."""
    language: Annotated[str | None, unset("MODULE:FUNCTION", "none is asked")] = None
    """A function of yours that tells a text's language, such as mine.py:detect."""
    languages: tuple[str, ...] = ("en",)
    """What it may say of a text that is kept."""
    quality: Annotated[str | None, unset("MODULE:FUNCTION", "none is asked")] = None
    """A function of yours that scores a text; the score is written in the row's field "quality"."""
    least_quality: float = 0.5
    """The least score of a text that is kept."""

    def check(self) -> None:
        super().check()
        from fastlm.trainer.data.cleaning.passes import REPEATS
        from fastlm.trainer.data.cleaning.rules import RULES

        known = (*RULES, *REPEATS)
        for name in self.without:
            if name not in known:
                raise Refusal(f"--without {name} is unknown{did_you_mean(name, known)}; choose from {', '.join(known)}")
        if self.bad_words is not None and not self.bad_words.is_file():
            raise Refusal(f"--bad-words {absent(self.bad_words, 'give a file of words')}")
        for name in ("language", "quality"):
            if getattr(self, name) is not None:
                hook(flag(name), getattr(self, name))


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


COMMANDS: dict[str, type] = {"clean": Clean, "pack": Pack, "inspect": Inspect}

"""Everything `fastlm reproduce` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastlm.trainer.options.choices import choices
from fastlm.trainer.words import Refusal, flag


@dataclass(frozen=True)
class Reproduce:
    """Run a small counterpart of a paper's table or figure, in minutes, and write its figure and a report."""

    name: Literal[(*choices("experiment"), "all")]
    """Which; all, or --all, for one after the other."""
    out: Path = Path("runs/reproduce")
    """Folder to write; what is there of the same names is replaced."""
    seeds: int = 3
    """How many models of each kind, with seeds from 0 on."""
    effort: float = 1.0
    """What the number of updates is multiplied by."""
    threads: int = 1
    """CPU threads."""

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values no experiment can have."""
        for name in ("seeds", "threads"):
            if getattr(self, name) < 1:
                raise Refusal(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.effort < float("inf"):
            raise Refusal(f"--effort is {self.effort:g}; it must be a finite number above 0")

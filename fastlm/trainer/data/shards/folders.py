"""What tells a folder of shards, finished or not, from others; every run asks, so this imports little."""

from collections.abc import Sequence
from pathlib import Path

from fastlm.trainer.words import Refusal

MANIFEST = "pack.json"
FOLDER = ".work"  # of what is being written, and what was asked for
ASKED = "asked.json"


def is_packed(path: Path) -> bool:
    """Whether a folder is one of shards, or is to become one."""
    return (path / MANIFEST).exists() or (path / FOLDER / ASKED).exists()


def packed_of(data: Sequence[Path]) -> Path | None:
    """The folder of shards that is learned from, if one of these is."""
    return next(filter(is_packed, data), None)


def check_asked(data: Sequence[Path], validation: Sequence[Path], weights: Sequence[str]) -> None:
    """Raises Refusal, naming the flag, for what does not go together with a folder of shards, or without one."""
    packed = packed_of(data)
    if packed is None and weights:
        asked = f"--weights {' '.join(weights)}"
        raise Refusal(f"{asked} are of sources in a folder of `fastlm data pack`; give that with --data")
    if packed is not None and len(data) > 1:
        raise Refusal(f"--data {packed} is a folder of shards; give it alone, or pack the others with its sources")
    if packed is not None and validation:
        raise Refusal(f"--data {packed} has its held-out side; leave --validation to `fastlm data pack`")

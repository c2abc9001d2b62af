"""`fastlm data inspect`: what a folder of shards holds, or a text, and whether it is whole."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.shards.folders import is_packed
from fastlm.trainer.data.shards.packed import Packed, Shard, open_packed
from fastlm.trainer.data.shards.reading import documents, placed
from fastlm.trainer.data.shards.sources import PART, named
from fastlm.trainer.data.tokenizer import EOS, dtype_of, load_tokenizer
from fastlm.trainer.options.data import Inspect
from fastlm.trainer.words import Failure, count, several, size

Say = Callable[..., None]
BLOCK = 1 << 22  # ids looked at together
SHOWN = 300  # characters of a document
POWERS = 40  # lengths are counted by powers of two


class Lengths:
    """Of documents: how many, and how long, by powers of two."""

    def __init__(self):
        self.counts = np.zeros(POWERS, np.int64)
        self.total, self.longest = 0, 0

    def add(self, lengths: np.ndarray) -> None:
        if len(lengths):
            self.counts += np.bincount(np.frexp(lengths)[1], minlength=POWERS)  # 2^(e-1) ≤ length < 2^e
            self.total += int(lengths.sum())
            self.longest = max(self.longest, int(lengths.max()))

    def said(self, of: str) -> tuple[str, ...]:
        """Documents, and how long they are in the middle and at most."""
        n = int(self.counts.sum())
        if not n:
            return ("0 documents",)
        half = int(np.searchsorted(self.counts.cumsum(), (n + 1) // 2))
        middle = f"half of them below {2**half:,} {of}"
        return several(n, "document"), f"{self.total / n:,.0f} {of} each", middle, f"at most {self.longest:,}"


def inspect(asked: Inspect, say: Say) -> None:
    """Say what is there.

    Args:
        asked: the command's flags.
        say: called with a label and its parts for each line that is shown.

    Raises:
        Refusal: for what cannot be read.
        Failure: for a folder of shards of which a file is not what it was.
    """
    _packed(open_packed(asked.path), asked.seed, say) if is_packed(asked.path) else _text(asked, say)


def _packed(packed: Packed, seed: int, say: Say) -> None:
    lengths = {(shard.source, shard.side): Lengths() for shard in packed.sources}
    dtype = dtype_of(packed.vocab_size)
    whole: list[tuple[Shard, Path]] = []

    def look(shard: Shard, path: Path) -> None:
        lengths[shard.source, shard.side].add(_lengths(np.memmap(path, dtype, "r")))
        whole.append((shard, path))

    faults = list(packed.faults(look))
    say("packed", packed.name, f"byte-level BPE {packed.vocab_size:,}", f"SHA-256 {packed.fingerprint[:12]}")
    for (source, side), found in lengths.items():
        shards = [shard for shard in packed.of_side(side) if shard.source == source]
        tokens, text = (sum(getattr(shard, name) for shard in shards) for name in ("tokens", "bytes"))
        there = (
            f"{count(tokens)} tokens in {several(len(shards), 'file')}",
            size(text),
            f"{text / tokens:.2f} bytes each",
        )
        say(source, side.replace("_", " "), *there, *found.said("tokens"))
    for line in packed.skipped.lines():
        say("skipped", line)
    if whole and not faults:
        _, path = random.Random(seed).choice(whole)
        tokenizer = load_tokenizer(packed.folder / "tokenizer.json")
        say("sample", str(path), repr(_document(np.memmap(path, dtype, "r"), seed, tokenizer)[:SHOWN]))
    for fault in faults:
        say("damaged", fault)
    if faults:
        raise Failure(f"{several(len(faults), 'file')} of {packed.name} not as packed: {faults[0]}; restore it")
    say("whole", f"all {several(len(whole), 'file')} are as they were written, by their SHA-256")


def _lengths(ids: np.ndarray) -> np.ndarray:
    """[D] int64: tokens of each document with its <eos>."""
    ends = [first + np.flatnonzero(ids[first : first + BLOCK] == EOS) for first in range(0, len(ids), BLOCK)]
    return np.diff(np.concatenate(ends), prepend=-1)


def _document(ids: np.ndarray, seed: int, tokenizer) -> str:
    """One that begins near a place that the seed draws, or the first."""
    at = random.Random(seed).randrange(len(ids))
    ends = at + np.flatnonzero(ids[at : at + BLOCK] == EOS)
    begin = int(ends[0]) + 1 if len(ends) and ends[0] + 1 < len(ids) else 0
    return tokenizer.decode(ids[begin : begin + SHOWN].tolist(), skip_special_tokens=False).split("<eos>")[0]


def _text(asked: Inspect, say: Say) -> None:
    skipped = Skipped()
    (source,) = named((str(asked.path),), skipped)
    lengths, draw, sample = Lengths(), random.Random(asked.seed), None
    parts = source.parts(PART)
    for part in parts:
        for number, document in enumerate(documents(part, asked.text_key, skipped.add), 1):
            lengths.add(np.array([len(document.text)]))
            if draw.random() * number < 1:  # each is as likely to be the last that is kept
                sample = document
    say("text", str(asked.path), several(len(source.files), "file"), *lengths.said("characters"))
    for line in Skipped.merged(placed(skipped.to_json(), parts)).lines():
        say("skipped", line)
    if sample is not None:
        ((_, (place,)),) = placed({"sample": (1, [sample.mark])}, parts).values()
        say("sample", place, repr(sample.text[:SHOWN]))

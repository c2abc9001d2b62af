"""A folder that `fastlm data pack` made: checked, and opened as the text of a run."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.shards.folders import MANIFEST
from fastlm.trainer.data.shards.joined import Joined
from fastlm.trainer.data.shards.packing import FORMAT, TOKENIZER, digest
from fastlm.trainer.data.tokenizer import dtype_of
from fastlm.trainer.data.tokens import Facts, Tokens, sha256
from fastlm.trainer.options.assigned import assigned
from fastlm.trainer.words import Refusal, several

if TYPE_CHECKING:  # torch takes seconds, and packing does without
    from fastlm.objectives.samples import Mixture


@dataclass(frozen=True)
class Shard:
    """A file of ids. side: train or held_out. bytes: of the text."""

    source: str
    file: str
    side: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """A folder of shards, as a run meets a `Corpus`.

    Args:
        folder: where.
        manifest: what its pack.json holds.
    """

    folder: Path
    manifest: dict
    repeated: float = 0.0  # nobody looked; `fastlm data clean` does

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @cached_property
    def sources(self) -> list[Shard]:
        """Its shards, in order."""
        found = self.manifest["sources"].items()
        return [Shard(name, **shard) for name, source in found for shard in source["shards"]]

    def of_side(self, side: str) -> list[Shard]:
        return [shard for shard in self.sources if shard.side == side]

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.sources)

    @property
    def skipped(self) -> Skipped:
        return Skipped.merged(*(source["skipped"] for source in self.manifest["sources"].values()))

    @property
    def split(self) -> str:
        return f"held out: {several(sum(shard.documents for shard in self.of_side('held_out')), 'document')}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the tokenizer's and every shard's."""
        listing = "".join(f"{shard.file}\0{shard.sha256}\n" for shard in self.sources)
        return hashlib.sha256(f"{self.manifest['tokenizer']}\n{listing}".encode()).hexdigest()

    def faults(self, looked_at: Callable[[Shard, Path], None] = lambda shard, path: None) -> Iterator[str]:
        """What is wrong with which file. looked_at: is called with every shard that is whole."""
        size = dtype_of(self.vocab_size).itemsize
        path = self.folder / TOKENIZER
        if not path.exists() or sha256(path) != self.manifest["tokenizer"]:
            yield f"{path} is not the one that it was packed by"
        for shard in self.sources:
            path = self.folder / shard.file
            if not path.exists():
                yield f"{path} is missing"
            elif (there := path.stat().st_size) != shard.tokens * size:
                yield f"{path} has {there:,} bytes, and had {shard.tokens * size:,}"
            elif (found := sha256(path)) != shard.sha256:
                yield f"{path} is damaged: its SHA-256 is {found[:12]}, and was {shard.sha256[:12]}"
            else:
                looked_at(shard, path)

    def tokens(self, weights: Sequence[str] = ()) -> Tokens:
        """The ids of both sides. weights: NAME=NUMBER of each source's share of the samples; of none, all as they are.

        Raises Refusal for weights that are not of its sources.
        """
        train, held_out = (sum(shard.bytes for shard in self.of_side(side)) for side in ("train", "held_out"))
        facts = Facts(
            self.vocab_size, train, held_out, self.manifest["zlib_bits"], self.manifest["unigram_nats"], files={}
        )
        streams = self._mixed(weights) if weights else self._joined(self.of_side("train"))
        return Tokens(self.folder, facts, streams, self._joined(self.of_side("held_out")), 0.0)

    def _joined(self, shards: Sequence[Shard]) -> Joined:
        files = [(self.folder / shard.file, shard.tokens) for shard in shards]
        return Joined(files, dtype_of(self.vocab_size))

    def _mixed(self, weights: Sequence[str]) -> "Mixture":
        from fastlm.objectives.samples import Mixture

        shards: dict[str, list[Shard]] = {}
        for shard in self.of_side("train"):
            shards.setdefault(shard.source, []).append(shard)
        given = assigned("--weights", weights, dict.fromkeys(shards, 0.0), f"--data {self.folder}")
        for name in shards:
            if name not in given:
                raise Refusal(f"--weights says nothing of {name}, a source of {self.folder}; give {name}=0 to leave it")
            if not 0 <= given[name] < math.inf:
                raise Refusal(f"--weights {name}={given[name]:g} is no share; give a number from 0 on")
        if not sum(given.values()):
            raise Refusal("--weights are all 0; give some source a share")
        taken = [name for name in shards if given[name]]
        try:
            return Mixture([self._joined(shards[name]) for name in taken], [given[name] for name in taken])
        except ValueError as error:
            raise Refusal(f"--weights {' '.join(weights)}: {error}") from error


def open_packed(path: Path) -> Packed:
    """A folder of shards. Raises Refusal for one that is not finished, altered, or of another version."""
    file = path / MANIFEST
    if not file.exists():
        raise Refusal(f"{path} is not packed to its end; the command that began it goes on")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        whole = manifest["sha256"] == digest(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{file} cannot be understood ({error}); pack again") from error
    if not whole:
        raise Refusal(f"{file} was altered (its SHA-256 is another); pack again")
    if manifest["format"] != FORMAT:
        raise Refusal(f"{file} is of format {manifest['format']}, and this fastlm reads {FORMAT}; pack again")
    return Packed(path, manifest)


def checked(path: Path) -> Packed:
    """The same, all of whose files are what they were. Raises Refusal with the first that is not."""
    packed = open_packed(path)
    for fault in packed.faults():
        raise Refusal(f"{fault}; restore it, or pack again into another folder")
    return packed

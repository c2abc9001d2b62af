"""From text to a file of token ids: the cache that keeps them and their tokenizer, and the numbers a loss is compared
with.

The tokenizer is trained on the train side only. Ids are memory-mapped, 16 bits each where the vocabulary allows,
documents separated by <eos>.

    ~/.cache/fastlm/<hash of the text and the vocabulary's size>/   (XDG_CACHE_HOME is respected)
        tokenizer.json  train.bin  held_out.bin  facts.json        facts.json has the SHA-256 of the others and itself

An entry is written to a temporary folder and renamed; one that does not match its facts is built again. What builders
that were killed left behind is removed when it is a day old.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastlm.trainer.data import tokenizer
from fastlm.trainer.data.corpus import Corpus
from fastlm.trainer.data.tokenizer import dtype_of, learned_share, load_tokenizer, most_ids
from fastlm.trainer.words import Refusal

FORMAT = 2  # raise it when the files' meaning changes
FILES = ("tokenizer.json", "train.bin", "held_out.bin")
TEMPORARY = ".tmp-"
DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Facts:
    """What is known of the ids besides the ids.

    zlib_bits: bits per byte of zlib -9 over each held-out document by itself. unigram_nats: nats per held-out token
    when each is guessed by how often it occurs in train (plus one); a model that looks at its input at all must do
    better.
    """

    vocab_size: int
    train_bytes: int
    held_out_bytes: int
    zlib_bits: float
    unigram_nats: float
    files: dict[str, tuple[int, str]]  # name → size, SHA-256


@dataclass(frozen=True)
class Tokens:
    """A corpus as ids. train, held_out: [N] uint16 or uint32, memory-mapped. folder holds tokenizer.json."""

    folder: Path
    facts: Facts
    train: np.ndarray
    held_out: np.ndarray
    built: float  # seconds spent on building it; 0 if it was in the cache

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def bytes_per_token(self) -> float:
        return self.facts.train_bytes / len(self.train)

    @property
    def held_out_share(self) -> float:
        """Share of the text's bytes that are held out."""
        return self.facts.held_out_bytes / (self.facts.held_out_bytes + self.facts.train_bytes)

    def bytes_of(self) -> np.ndarray:
        """[V] int64: how many bytes of text each id stands for; 0 for the special ids."""
        return tokenizer.bytes_of(load_tokenizer(self.tokenizer_file))

    def bits_per_byte(self, nats: float) -> float:
        """Nats a held-out token → bits a byte of text, which does not depend on the tokenizer."""
        return nats * len(self.held_out) / self.facts.held_out_bytes / math.log(2)

    def nats_per_token(self, bits: float) -> float:
        """The way back."""
        return bits / self.bits_per_byte(1.0)


def tokenize(
    corpus: Corpus,
    vocab: int,
    tokenizer_file: Path | None = None,
    building: Callable[[], None] = lambda: None,
    learned: bool = True,
) -> Tokens:
    """The corpus as ids, from the cache if they are there. tokenizer_file: use this one instead of training one;
    building: is called if they are not there, before the work; learned: whether that tokenizer was learned from this
    corpus, and not from another.

    Raises Refusal if the cache cannot be written, or a file of the text changes meanwhile.
    """
    known_by = vocab if learned else sha256(tokenizer_file)
    made_from = json.dumps([corpus.fingerprint, corpus.split, known_by, FORMAT])
    folder = cache_folder() / hashlib.sha256(made_from.encode()).hexdigest()[:16]
    facts = _valid_facts(folder, tokenizer_file)
    if facts is not None:
        return _open(folder, facts, 0.0)
    building()
    begun = time.perf_counter()
    try:
        facts = _build(folder, corpus, vocab, tokenizer_file)
    except OSError as error:
        raise Refusal(
            f"the cache {folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    return _open(folder, facts, time.perf_counter() - begun)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Building an entry of the cache


def _build(folder: Path, corpus: Corpus, vocab: int, tokenizer_file: Path | None) -> Facts:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    made = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    try:
        if tokenizer_file is None:
            share = learned_share(corpus.documents(held_out=False), corpus.bytes)
            most = most_ids(vocab, corpus.bytes)
            tokenizer.train(corpus.documents(held_out=False), most, made / "tokenizer.json", share)
        else:
            shutil.copyfile(tokenizer_file, made / "tokenizer.json")
        encoder = load_tokenizer(made / "tokenizer.json")
        train_bytes, counts = tokenizer.encode(encoder, corpus.documents(held_out=False), made / "train.bin")
        held_out_bytes, seen = tokenizer.encode(encoder, corpus.documents(held_out=True), made / "held_out.bin")
        packed = sum(len(zlib.compress(text.encode(), 9)) for text in corpus.documents(held_out=True))
        unigram = -(seen * np.log((counts + 1) / (counts + 1).sum())).sum() / seen.sum()
        files = {name: ((made / name).stat().st_size, sha256(made / name)) for name in FILES}
        facts = Facts(len(counts), train_bytes, held_out_bytes, 8 * packed / held_out_bytes, float(unigram), files)
        (made / "facts.json").write_text(
            json.dumps({"facts": asdict(facts), "sha256": _digest(asdict(facts))}, indent=1)
        )
        return _place(made, folder, facts, tokenizer_file)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _place(made: Path, folder: Path, facts: Facts, tokenizer_file: Path | None) -> Facts:
    """Rename a built entry to where it belongs; return the facts of the entry that is there then, which may be the work
    of another process that was faster. Every rename is one step: nobody meets half an entry.
    """
    if (others := _valid_facts(folder, tokenizer_file)) is not None:
        return others
    with suppress(FileNotFoundError):
        shutil.rmtree(folder.rename(made.with_name(f"{made.name}-damaged")))
    try:
        made.rename(folder)
    except OSError:
        if (others := _valid_facts(folder, tokenizer_file)) is None:
            raise
        return others
    return facts


def _sweep(cache: Path) -> None:
    """Remove temporary folders in which nothing was written for a day: their builders are dead."""
    for left in cache.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError):  # a builder is done with it at this moment
            if time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir())) > DAY:
                shutil.rmtree(left)


# ---------------------------------------------------------------------------------------------------------------------
# Trusting one


def _valid_facts(folder: Path, tokenizer_file: Path | None) -> Facts | None:
    """The facts of an entry whose files match them (and whose tokenizer is the wanted one), else None."""
    try:
        written = json.loads((folder / "facts.json").read_text())
        facts = Facts(**written["facts"])
        whole = written["sha256"] == _digest(written["facts"])
        for name, (size, sha) in facts.files.items():
            whole = whole and (folder / name).stat().st_size == size and sha256(folder / name) == sha
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if not whole or set(facts.files) != set(FILES):
        return None
    wanted = tokenizer_file is None or facts.files["tokenizer.json"][1] == sha256(tokenizer_file)
    return facts if wanted else None


def _digest(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _open(folder: Path, facts: Facts, built: float) -> Tokens:
    train, held_out = (
        np.memmap(folder / name, dtype_of(facts.vocab_size), "r") for name in ("train.bin", "held_out.bin")
    )
    return Tokens(folder, facts, train, held_out, built)

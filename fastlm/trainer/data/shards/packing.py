"""Packing: documents as ids in files that a run maps into memory, written once.

    DIR/  tokenizer.json  pack.json
          <source>/train-00000.bin  held_out-00000.bin     ids of a part's documents, <eos> after each
          held-out/held_out-00000.bin                      of --validation, in sources of their own

A document is held out by a hash of its bytes, as elsewhere; of one too long for that to be fair the end is held out
instead. That depends on nothing but the document, so that a copy lands on the same side.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastlm.trainer.data import tokenizer
from fastlm.trainer.data.corpus import chosen, tail
from fastlm.trainer.data.encoding import Encoder
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.shards.folders import MANIFEST
from fastlm.trainer.data.shards.reading import documents, placed
from fastlm.trainer.data.shards.sources import Part
from fastlm.trainer.data.shards.work import Work
from fastlm.trainer.data.tokens import sha256
from fastlm.trainer.words import Refusal

FORMAT = 1  # raise it when the files' meaning changes
TOKENIZER = "tokenizer.json"
SIDES = ("train", "held_out")
LONG = 1 << 18  # characters from which the end of a document is held out


def sides_of(document: str, split: str) -> dict[str, str]:
    """Side → what of the document it has. split: the side of all of it, or "both"."""
    if split != "both":
        return {split: document}
    if len(document) >= LONG:
        cut = tail(document)
        return {"train": document[:cut], "held_out": document[cut:]}
    return {"held_out" if chosen(document) else "train": document}


def pack(work: Work, part: Part, text_key: str, split: str) -> dict:
    """Write the shards of a part; return what there is to know of them. split: as in `sides_of`."""
    skipped, encoder = Skipped(), _encoder(work.out / TOKENIZER)
    files = {side: work.out / part.source / f"{side}-{part.number:05}.bin" for side in SIDES}
    sides: dict[str, tokenizer.Ids] = {}
    zlib_bytes = 0
    with ExitStack() as opened:
        for document in documents(part, text_key, skipped.add):
            for side, text in sides_of(document.text, split).items():
                if side not in sides:
                    sides[side] = tokenizer.Ids(encoder, opened.enter_context(work.file(files[side])))
                sides[side].add(text)
                zlib_bytes += len(zlib.compress(text.encode(), 9)) if side == "held_out" else 0
        for ids in sides.values():
            ids.flush()
    with work.file(counts_file(work, part)) as file:
        nothing = np.zeros(encoder.tokenizer.get_vocab_size(), np.int64)
        np.save(file, np.stack([sides[side].counts if side in sides else nothing for side in SIDES]))
    shards = [
        {
            "file": files[side].relative_to(work.out).as_posix(), "side": side, "tokens": int(ids.counts.sum()),
            "documents": ids.documents, "bytes": ids.size, "sha256": ids.digest.hexdigest(),
        }
        for side, ids in sorted(sides.items())
    ]  # fmt: skip
    return {"shards": shards, "zlib_bytes": zlib_bytes, "skipped": skipped.to_json()}


def counts_file(work: Work, part: Part) -> Path:
    """Where it stands until the end how often each id is in a part: [2, V] int64, of both sides."""
    return work.folder / f"{part.name}.npy"


@lru_cache(maxsize=1)
def _encoder(path: Path) -> Encoder:
    """Of this process, which knows more words with each part."""
    return tokenizer.encoder_of(tokenizer.load_tokenizer(path))


def learn_tokenizer(work: Work, parts: Sequence[Part], text_key: str, split: str, vocab: int) -> None:
    """Make the tokenizer.json from the first documents of every part, all of them together as many bytes as a
    vocabulary is learned from.
    """
    made = work.folder / TOKENIZER
    tokenizer.train(_first(parts, text_key, split, tokenizer.LEARNED // len(parts)), vocab, made)
    with work.file(work.out / TOKENIZER) as file:
        file.write(made.read_bytes())


def _first(parts: Iterable[Part], text_key: str, split: str, size: int) -> Iterator[str]:
    """Of the train side, up to so many bytes of each part, one document at least."""
    for part in parts:
        left = size
        for document in documents(part, text_key, lambda reason, place: None):
            text = sides_of(document.text, split).get("train", "")
            yield text[: max(left, 1)]
            left -= len(text.encode())
            if left <= 0:
                break


def finish(work: Work, asked: dict, parts: Sequence[Part]) -> dict:
    """Write the manifest of parts that are packed.

    Raises Refusal if there is nothing to train on, or nothing that is held out.
    """
    sources: dict[str, dict] = {}
    counts, zlib_bytes = 0, 0
    for part in parts:
        found = work.found(part.name)
        source = sources.setdefault(part.source, {"shards": [], "skipped": Skipped().to_json()})
        source["shards"] += found["shards"]
        source["skipped"] = Skipped.merged(source["skipped"], found["skipped"]).to_json()
        counts, zlib_bytes = counts + np.load(counts_file(work, part)), zlib_bytes + found["zlib_bytes"]
    for name, source in sources.items():
        source["skipped"] = placed(source["skipped"], [part for part in parts if part.source == name])
    for side, row in zip(SIDES, counts, strict=True):
        if not row.sum():
            raise Refusal(_nothing(work, side, sources))
    seen, held_out = counts
    held_out_bytes = sum(s["bytes"] for x in sources.values() for s in x["shards"] if s["side"] == "held_out")
    manifest = {
        "format": FORMAT, "asked": asked, "vocab_size": len(seen), "tokenizer": sha256(work.out / TOKENIZER),
        "zlib_bits": 8 * zlib_bytes / held_out_bytes,
        "unigram_nats": float(-(held_out * np.log((seen + 1) / (seen + 1).sum())).sum() / held_out.sum()),
        "sources": sources,
    }  # fmt: skip
    work.write(work.out / MANIFEST, json.dumps(manifest | {"sha256": digest(manifest)}, indent=1))
    work.end()
    return manifest


def _nothing(work: Work, side: str, sources: dict) -> str:
    reasons = Skipped.merged(*(source["skipped"] for source in sources.values())).lines()
    if side == "train":
        return f"no text to train on ({'; '.join(reasons) or 'all of it is held out'}); give other sources"
    return "no document is held out, of so few; give more text, or --validation with a text of its own"


def digest(manifest: dict) -> str:
    """SHA-256 of a manifest without its own."""
    whole = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

"""Three passes over the documents: each by itself, all by their keys, and what is kept.

    OUT/.work/<part>.rows  <part>.keys.npz      after the first: what is left of its documents, two lines each: where it
                                                was and the bytes of its text, and the row; and their keys
    OUT/.work/<part>.repeats.npz                after the second: which repeat an earlier one
    OUT/<source>/00000.jsonl                    after the third: rows {"text": ...}, with "quality" if it is asked for

The first and the third are done in parts, by any number of processes. The second holds a key of 8 bytes for each
document and each of its spans, and a bit more while it looks for equal ones: LIMIT of them at a time.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlm.trainer.data.cleaning.rules import RULES, Rules, sentences
from fastlm.trainer.data.cleaning.sketches import BANDS, SPAN, band_keys, keys, span_keys
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.shards.reading import documents
from fastlm.trainer.data.shards.sources import Part
from fastlm.trainer.data.shards.work import Work
from fastlm.trainer.options.plugins import hook

LIMIT = 1 << 24  # keys compared at a time
TOGETHER = 1 << 18  # characters whose keys are made at a time
EXCERPT = 120  # characters of an example
ENCODER = json.JSONEncoder(ensure_ascii=False)
REPEATS = {
    "exact": "a document that is another's text, but for case and white space",
    "near": "a document that is nearly another's text (MinHash)",
    "spans": "a sentence of three in a row that stood before, taken out",
}
HOOKS = {"language": "a document of another language than --languages", "quality": "a document below --least-quality"}
REASONS = RULES | HOOKS | REPEATS


@dataclass(frozen=True)
class Cleaning:
    """What a process has to know. without: names of rules and REPEATS that are left out; language, quality:
    MODULE:FUNCTION, or None.
    """

    text_key: str
    without: tuple[str, ...]
    bad_words: frozenset[str]
    language: str | None
    languages: tuple[str, ...]
    quality: str | None
    least_quality: float

    @property
    def rules(self) -> Rules:
        return Rules(self.without, self.bad_words)


class Report:
    """What was dropped and why: how often, and the first examples of each."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples = Skipped()

    def add(self, reason: str, mark: str, text: str) -> None:
        self.counts[reason] += 1
        self.examples.add(reason, f"{mark} {text[:EXCERPT]!r}")

    def to_json(self) -> dict:
        return {"counts": dict(self.counts), "examples": self.examples.to_json()}


def judge(work: Work, part: Part, asked: Cleaning) -> dict:
    """The first pass over a part: what is left of each document by itself."""
    report, skipped, made = Report(), Skipped(), _Keys(asked.without)
    rules = asked.rules
    with work.file(rows_file(work, part)) as file:
        for document in documents(part, asked.text_key, skipped.add):
            report.counts["documents"] += 1
            report.counts["bytes"] += len(document.text.encode())
            text, reason = rules.applied(document.text, report.counts)
            row = {"text": text}
            if reason is None:
                reason = _hooked(asked, row)
            if reason is not None:
                report.add(reason, document.mark, document.text)
                continue
            made.add(text)
            file.write(f"{ENCODER.encode([document.mark, len(text.encode())])}\n{ENCODER.encode(row)}\n".encode())
    with work.file(work.folder / f"{part.name}.keys.npz") as file:
        np.savez(file, **made.arrays())
    return report.to_json() | {"skipped": skipped.to_json()}


def rows_file(work: Work, part: Part) -> Path:
    """What is left of its documents after the first pass."""
    return work.folder / f"{part.name}.rows"


def _hooked(asked: Cleaning, row: dict) -> str | None:
    """The hook that a text falls under; its score is noted in the row."""
    if asked.language is not None and hook("--language", asked.language)(row["text"]) not in asked.languages:
        return "language"
    if asked.quality is not None:
        row["quality"] = float(hook("--quality", asked.quality)(row["text"]))
        if not row["quality"] >= asked.least_quality:  # NaN is below
            return "quality"
    return None


class _Keys:
    """Keys of texts, made of many at a time. without: names of REPEATS that nobody asks for."""

    def __init__(self, without: Sequence[str]):
        self.kinds = [name for name in REPEATS if name not in without]
        self.waiting, self.size = [], 0
        nothing = np.zeros(0, np.uint64)
        self.found: dict[str, list[np.ndarray]] = {
            "exact": [nothing], "near": [nothing.reshape(0, BANDS)], "spans": [nothing],
            "spans_of": [np.zeros(0, np.int64)],
        }  # fmt: skip

    def add(self, text: str) -> None:
        self.waiting.append(text)
        self.size += len(text)
        if self.size > TOGETHER:
            self.flush()

    def flush(self) -> None:
        texts, self.waiting, self.size = self.waiting, [], 0
        if not texts:
            return
        if "exact" in self.kinds:
            self.found["exact"].append(keys(texts))
        if "near" in self.kinds:
            self.found["near"].append(band_keys(texts))
        if "spans" in self.kinds:
            spans, counts = span_keys(texts)
            self.found["spans"].append(spans)
            self.found["spans_of"].append(counts)

    def arrays(self) -> dict[str, np.ndarray]:
        self.flush()
        return {name: np.concatenate(some) for name, some in self.found.items()}


def find_repeats(work: Work, parts: Sequence[Part]) -> None:
    """The second pass: mark in every part the documents, and the spans of those that stay, that stood before."""
    load = lambda name: (np.load(work.folder / f"{part.name}.keys.npz")[name] for part in parts)
    exact = repeats(lambda: load("exact"))
    near = [np.zeros(len(found), bool) for found in load("near")]
    for band in range(BANDS):
        found = repeats(lambda band=band: (found[:, band] for found in load("near")))
        near = [old | new for old, new in zip(near, found, strict=True)]
    stay = [~_any(a, b) for a, b in zip(exact, near, strict=True)]
    lengths = list(load("spans_of"))
    stay = _filled(stay, lengths)
    standing = [np.repeat(s, n) if len(n) else np.zeros(0, bool) for s, n in zip(stay, lengths, strict=True)]
    kept = repeats(lambda: (found[those] for found, those in zip(load("spans"), standing, strict=True)))
    for part, e, n, those, found in zip(parts, exact, near, standing, kept, strict=True):
        spans = np.zeros(len(those), bool)
        spans[those] = found
        with work.file(work.folder / f"{part.name}.repeats.npz") as file:
            np.savez(file, exact=e, near=n, spans=spans)


def _any(exact: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Either, where one of them may not have been looked for."""
    if not len(exact) or not len(near):
        return exact if len(exact) else near
    return exact | near


def _filled(stay: list[np.ndarray], lengths: list[np.ndarray]) -> list[np.ndarray]:
    """For parts whose documents were compared by nothing, that all stay."""
    return [s if len(s) else np.ones(len(n), bool) for s, n in zip(stay, lengths, strict=True)]


def repeats(load: Callable[[], Iterator[np.ndarray]]) -> list[np.ndarray]:
    """Arrays of keys → as many of bool: which key stood before, in the same array or an earlier one."""
    lengths = [len(each) for each in load()]
    begins = np.cumsum([0, *lengths])
    found = np.zeros(begins[-1], bool)
    rounds = np.uint64(-(-begins[-1] // LIMIT) or 1)
    for turn in range(int(rounds)):
        chosen = [np.flatnonzero(each % rounds == turn) for each in load()]
        some = np.concatenate([each[at] for each, at in zip(load(), chosen, strict=True)])
        _, first = np.unique(some, return_index=True)
        again = np.ones(len(some), bool)
        again[first] = False
        places = [at + begin for at, begin in zip(chosen, begins, strict=False)]
        found[np.concatenate(places)[again]] = True
    return np.split(found, begins[1:-1])


def keep(work: Work, part: Part, asked: Cleaning) -> dict:
    """The third pass over a part: write what is kept."""
    report, marks = Report(), np.load(work.folder / f"{part.name}.repeats.npz")
    exact, near, spans = marks["exact"], marks["near"], marks["spans"]
    lengths = np.load(work.folder / f"{part.name}.keys.npz")["spans_of"]
    ends = np.cumsum(lengths)
    with (
        rows_file(work, part).open("rb") as rows,
        work.file(work.out / part.source / f"{part.number:05}.jsonl") as file,
    ):
        for number, (where, line) in enumerate(zip(rows, rows, strict=True)):
            mark, size = json.loads(where)
            repeated = len(exact) and exact[number], len(near) and near[number]
            if any(repeated):
                report.add("exact" if repeated[0] else "near", mark, json.loads(line)["text"])
                continue
            again = spans[ends[number] - lengths[number] : ends[number]] if len(lengths) else spans
            if again.any():
                row = json.loads(line)
                row["text"] = _without_spans(row["text"], again, mark, report)
                if asked.rules.too_short(row["text"]):
                    report.add("sentences", mark, row["text"])
                    continue
                line, size = f"{ENCODER.encode(row)}\n".encode(), len(row["text"].encode())
            report.counts["kept documents"] += 1
            report.counts["kept bytes"] += size
            file.write(line)
    return report.to_json()


def _without_spans(text: str, again: np.ndarray, mark: str, report: Report) -> str:
    each = sentences(text)
    gone = np.convolve(again, np.ones(SPAN), "full") > 0
    for sentence in (sentence for sentence, out in zip(each, gone, strict=True) if out):
        report.add("spans", mark, sentence)
    return "".join(sentence for sentence, out in zip(each, gone, strict=True) if not out).strip()

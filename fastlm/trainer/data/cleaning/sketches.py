"""What tells that texts are alike, 64 bits each: a hash of the normalised text, hashes of three sentences in a row, and
MinHash (Broder 1997) in bands.

A document's signature are the least hashes of its shingles of SHINGLE words in each of BANDS · ROWS bins, by one hash
of each shingle (one permutation hashing: Li, Owen & Zhang 2012); an empty bin borrows from one that a hash chooses
(Shrivastava 2017, optimal densification). Two documents of Jaccard similarity s agree in some band with probability
1 - (1 - s^ROWS)^BANDS: 0.77 at s = 0.75, and 0.92 at 0.8.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np

from fastlm.backends.splitmix import mixed
from fastlm.trainer.data.cleaning.rules import sentences
from fastlm.trainer.data.splitting import STOP, Found, apart, joined

SHINGLE, BANDS, ROWS = 5, 14, 8
BINS = BANDS * ROWS
SPAN = 3  # sentences
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2⁶⁴
WORD = np.array([chr(i).isalnum() or i >= 128 for i in range(256)])  # of UTF-8's bytes, which belong to words
WHITE, MARKS, CLOSES = (
    np.array([of(chr(i)) for i in range(256)])
    for of in (lambda c: c.isspace() and c.isascii(), lambda c: c in ".!?", lambda c: c in "\"')]")
)
LINE = ord("\n")
NONE = np.uint64(2**64 - 1)


def keys(texts: Sequence[str]) -> np.ndarray:
    """[D] uint64: of each text, whatever its case and white space."""
    return _hashes(" ".join(text.lower().split()) for text in texts)


def span_keys(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each three sentences in a row of a text: [n] uint64, text by text; and [D], how many each text has."""
    plain = np.array([text.isascii() for text in texts], bool)
    ours, others = apart(texts, plain)
    each, counts = joined(plain, _ascii_sentences(ours), _sentences(others))
    of_text = np.repeat(np.arange(len(texts)), counts)
    spans = max(0, len(each) - SPAN + 1)
    inside = of_text[:spans] == of_text[SPAN - 1 :][:spans]
    return _folded(_shifted(each, SPAN))[inside], np.maximum(counts - SPAN + 1, 0)


def _sentences(texts: list[str]) -> Found:
    """Of each sentence of a text, without the white space around."""
    each = [sentences(text) for text in texts]
    data = [sentence.strip().encode() for sentence in chain.from_iterable(each)]
    lengths = np.array([len(some) for some in data], np.int64)
    ends = np.cumsum(lengths)
    return _polynomials(b"".join(data), ends - lengths, ends), np.array([len(some) for some in each], np.int64)


def _ascii_sentences(texts: list[str]) -> Found:
    """The same of texts in ASCII, cut all at once."""
    if not texts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    data = b"".join([text.encode() + STOP for text in texts])
    codes = np.frombuffer(data, np.uint8)
    white, stops = WHITE[codes], np.flatnonzero(codes == STOP[0])
    edges = np.flatnonzero(np.diff(white, prepend=False))
    begins, ends = edges[::2], edges[1::2]  # of stretches of white space
    cuts = np.unique(np.concatenate([[0], _ends(codes, begins, ends), stops, stops[:-1] + 1]))
    first, last = cuts[:-1], cuts[1:]
    inside = codes[first] != STOP[0]
    first, last = first[inside], last[inside]
    counts = np.diff(np.searchsorted(first, stops), prepend=0)
    if len(ends):  # what is white at a sentence's beginning and end is no part of it
        after = ends[np.minimum(np.searchsorted(ends, first, side="right"), len(ends) - 1)]
        first = np.where(white[first], np.minimum(after, last), first)
        before = begins[np.maximum(np.searchsorted(begins, last) - 1, 0)]
        last = np.where(white[last - 1], np.maximum(before, first), last)
    return _polynomials(data, first, last), counts


def _ends(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where SENTENCE ends in bytes of ASCII of which white space begins and ends in these places."""
    marks = np.flatnonzero(MARKS[codes]) + 1
    while len(more := np.flatnonzero(CLOSES[codes[marks]])):
        marks[more] += 1
    closed = np.zeros(len(ends) + 1, bool)  # whether what is before the white space ends a sentence
    closed[np.searchsorted(begins, marks[WHITE[codes[marks]]])] = True
    lines = np.flatnonzero((codes[1:] != LINE) & (codes[:-1] == LINE)) + 1
    return np.concatenate([ends[closed[:-1]], lines[~closed[np.searchsorted(ends, lines)]]])


def band_keys(texts: Sequence[str]) -> np.ndarray:
    """[D, BANDS] uint64: two texts that agree in one column are nearly the same."""
    encoded = [text.lower().encode() for text in texts]
    begins = np.cumsum([0, *(len(each) + 1 for each in encoded)])
    words, at = _word_hashes(b"\n".join(encoded))
    of_text = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(at, begins)))
    shingles = max(0, len(words) - SHINGLE + 1)
    inside = of_text[:shingles] == of_text[SHINGLE - 1 :][:shingles]
    hashes, of_text = _folded(_shifted(words, SHINGLE))[inside], of_text[:shingles][inside]
    bins = ((hashes >> np.uint64(32)) * np.uint64(BINS) >> np.uint64(32)).astype(np.int64)
    least = np.full(len(texts) * BINS, NONE)
    np.minimum.at(least, of_text * BINS + bins, hashes)
    least = least.reshape(len(texts), BINS)
    short = (least == NONE).all(1)  # no shingle, so that only the same words are alike
    least[short] = keys([text for text, is_short in zip(texts, short, strict=True) if is_short])[:, None]
    folded = [_folded([np.full(len(texts), band, np.uint64), *rows.T]) for band, rows in _bands(_filled(least))]
    return np.stack(folded, 1)


def _bands(least: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((band, least[:, band * ROWS : (band + 1) * ROWS]) for band in range(BANDS))


def _filled(least: np.ndarray) -> np.ndarray:
    """[D, BINS] with what empty bins borrow."""
    filled = least.copy()
    text, empty = np.nonzero(least == NONE)
    attempt = 0
    while len(empty):
        attempt += 1
        at = _mixed(empty.astype(np.uint64) + np.uint64(BINS * attempt)) % np.uint64(BINS)
        filled[text, empty] = least[text, at.astype(np.int64)]
        still = filled[text, empty] == NONE
        text, empty = text[still], empty[still]
    return filled


def _hashes(texts: Iterable[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _word_hashes(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """[W] uint64: of each word; and [W], where it begins."""
    inside = np.concatenate([[False], WORD[np.frombuffer(data, np.uint8)], [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return _polynomials(data, edges[::2], edges[1::2]), edges[::2]


def _polynomials(data: bytes, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[n] uint64: a polynomial of the bytes from each place to another, by sums over the whole."""
    powers, inverses = _powers(1 << max(10, len(data).bit_length()))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.multiply(np.frombuffer(data, np.uint8) + np.uint64(1), powers[: len(data)], out=sums[1:])
    np.cumsum(sums, out=sums)
    return (sums[ends] - sums[begins]) * inverses[begins]


@lru_cache(maxsize=4)
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2⁶⁴, for i from 0 to n - 1."""
    made = []
    for base in (BASE, pow(BASE, -1, 2**64)):
        steps = np.full(n, base, np.uint64)
        steps[0] = 1
        made.append(np.multiply.accumulate(steps))
    return made[0], made[1]


def _shifted(each: np.ndarray, n: int) -> list[np.ndarray]:
    """The first, second, … of each n in a row."""
    return [each[i : max(0, len(each) - n + 1) + i] for i in range(n)]


def _folded(columns: list[np.ndarray]) -> np.ndarray:
    """n arrays [N] uint64 → [N] uint64, of what stands at one place in all of them, in their order."""
    made = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        made = _mixed(made + column)
    return made


def _mixed(x: np.ndarray) -> np.ndarray:
    """The next number of SplitMix64 after x."""
    return mixed(x + np.uint64(BASE))

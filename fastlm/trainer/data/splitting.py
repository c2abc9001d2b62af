"""Where words begin in text, as the byte-level pre-tokenizer splits it by GPT-2's expression, for many texts at once:

    '(?:[stmd]|re|ve|ll)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

A word begins where the kind of character changes, but that white space gives its last character, if it is a space, to
what follows, and that a contraction is a word. `COMMON` is where Python agrees with the tokenizer on which characters
are letters, numbers and white space, in every version of Unicode that either has.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

COMMON = "\0-\u036f\u0391-\u03a1\u03a3-\u0481\u2010-\u2027\u2030-\u205e\u20a0-\u20b8\u2190-\u21ff\u2200-\u22ff"
RARE = re.compile(f"[^{COMMON}]")
LETTER, NUMBER, OTHER, SPACE, END = range(5)  # kinds of characters
WHITE = "\t\n\v\f\r \x85\xa0"
Found = tuple[np.ndarray, np.ndarray]  # in texts, one after the other; and how many in each, [D] int64
STOP = b"\xff"  # ends a text; no byte of UTF-8


def common(text: str) -> bool:
    """Whether all characters are of COMMON."""
    return text.isascii() or not RARE.search(text)


def apart(texts: Sequence[str], these: np.ndarray) -> tuple[list[str], list[str]]:
    """Texts for which these, [D] bool, holds, and the others."""
    ones, others = ([text for text, it in zip(texts, these, strict=True) if it == wanted] for wanted in (True, False))
    return ones, others


def joined(these: np.ndarray, ones: Found, others: Found) -> Found:
    """What was found in texts that `apart` divided, in the order of the texts."""
    counts = np.empty(len(these), np.int64)
    counts[these], counts[~these] = ones[1], others[1]
    values, here = np.empty(counts.sum(), ones[0].dtype), np.repeat(these, counts)
    values[here], values[~here] = ones[0], others[0]
    return values, counts


def starts(codes: np.ndarray) -> np.ndarray:
    """Where words begin.

    Args:
        codes: [N] uint8, texts of common characters in UTF-8, STOP after each of them.

    Returns:
        [W] int64, in order; each STOP is a word as well.
    """
    kinds = _kinds(codes)
    begin = np.ones(len(codes), bool)
    np.not_equal(kinds[1:], kinds[:-1], out=begin[1:])
    begin |= kinds == END
    after = np.flatnonzero((kinds[1:] < SPACE) & (kinds[:-1] == SPACE)) + 1  # what follows white space
    begin[after - np.where(codes[after - 1] < 128, 1, 2)] = True
    begin[after[codes[after - 1] == ord(" ")]] = False
    quote = np.flatnonzero(codes == ord("'"))
    quote = quote[begin[quote]]
    first, second = codes[quote + 1], codes[np.minimum(quote + 2, len(codes) - 1)]
    of = lambda letters: np.isin(first, np.frombuffer(letters, np.uint8))
    one = of(b"stmd")
    two = of(b"rv") & (second == ord("e")) | of(b"l") & (second == ord("l"))
    begin[quote[one | two] + 1] = False
    begin[quote[one] + 2] = True
    begin[quote[two] + 3] = True
    return np.flatnonzero(begin)


def _kinds(codes: np.ndarray) -> np.ndarray:
    """[N] uint8: the kind of the character that each byte belongs to."""
    of_ascii, of_all = _tables()
    kinds = of_ascii[codes]
    lead = np.flatnonzero(codes >= 0xC0)
    lead = lead[codes[lead] != STOP[0]]
    three = codes[lead] >= 0xE0
    first, second, third = (codes[lead + i].astype(np.int64) & 63 for i in range(3))
    kind = of_all[np.where(three, (first & 15) << 12 | second << 6 | third, (first & 31) << 6 | second)]
    kinds[lead] = kinds[lead + 1] = kind
    kinds[lead[three] + 2] = kind[three]
    return kinds


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The kind of each byte that is a character, and of each character of COMMON; made when the first text is split."""
    kinds = {"L": LETTER, "N": NUMBER}
    of_all = np.array([kinds.get(unicodedata.category(chr(i))[0], OTHER) for i in range(0x2300)], np.uint8)
    of_all[[ord(c) for c in WHITE]] = SPACE
    of_bytes = np.full(256, OTHER, np.uint8)
    of_bytes[:128] = of_all[:128]
    of_bytes[STOP[0]] = END
    return of_bytes, of_all

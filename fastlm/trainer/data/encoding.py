"""Ids of text, word by word: most words have been met before, and what the compiled tokenizer made of them is kept.

The byte-level pre-tokenizer splits a text into words by GPT-2's expression, and each word has its ids whatever stands
beside it. Python's `re` splits the same where the two agree on which characters are letters, numbers and white space:
`COMMON` is where they do, in every version of Unicode that either has. A text with any other character, such as Chinese
or an emoji, is left to the tokenizer.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

COMMON = "\0-\u036f\u0391-\u03a1\u03a3-\u0481\u2010-\u2027\u2030-\u205e\u20a0-\u20b8\u2190-\u21ff\u2200-\u22ff"
KEPT = 50_000_000  # characters of different words, at most
OVERHEAD = 100  # bytes that one takes besides, as if they were characters


def _class(holds: str) -> str:
    """The characters of COMMON in categories that begin with a letter, as in a pair of [ ]."""
    among = [chr(i) for i in range(0x3000) if _COMMON.match(chr(i))]
    return "".join(re.escape(c) for c in among if unicodedata.category(c)[0] == holds)


_COMMON = re.compile(f"[{COMMON}]")
OTHER = re.compile(f"[^{COMMON}]")
SPACE = "\\t-\\r \\x85\\xa0"


@cache
def word() -> re.Pattern:
    """GPT-2's expression; made when the first text is encoded, for every command imports this file."""
    letter, number = _class("L"), _class("N")
    return re.compile(
        f"'(?:[stmd]|re|ve|ll)| ?[{letter}]+| ?[{number}]+| ?[^{SPACE}{letter}{number}]+"
        f"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
    )


class Encoder:
    """What turns texts into ids.

    Args:
        tokenizer: byte-level BPE, as `load_tokenizer` opens it.
        dtype: of the ids.
    """

    def __init__(self, tokenizer, dtype: np.dtype):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.known: dict[str, bytes] = {}
        self.size = 0

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as the bytes of an array."""
        if self.size > KEPT:
            self.known, self.size = {}, 0
        strange = [bool(OTHER.search(text)) for text in texts]
        rest = iter(self._asked([text for text, is_strange in zip(texts, strange, strict=True) if is_strange]))
        return [next(rest) if is_strange else self._of(text) for text, is_strange in zip(texts, strange, strict=True)]

    def _of(self, text: str) -> bytes:
        words = word().findall(text)
        try:
            return b"".join(map(self.known.__getitem__, words))
        except KeyError:
            self._learn(set(words).difference(self.known))
            return b"".join(map(self.known.__getitem__, words))

    def _learn(self, words: set[str]) -> None:
        self.size += sum(map(len, words)) + OVERHEAD * len(words)
        self.known.update(zip(words, self._asked(list(words)), strict=True))

    def _asked(self, texts: list[str]) -> list[bytes]:
        return [np.array(found.ids, self.dtype).tobytes() for found in self.tokenizer.encode_batch_fast(texts)]

"""Ids of text, word by word: most words have been met before, and what the compiled tokenizer made of them is kept.

The byte-level pre-tokenizer splits a text into words, and each word has its ids whatever stands beside it. The words of
many texts are found and looked up at once; a text with a character that is not common, such as Chinese or an emoji, is
left to the tokenizer.
"""

from collections.abc import Sequence

import numpy as np

from fastlm.trainer.data.known import Known
from fastlm.trainer.data.splitting import STOP, Found, apart, common, joined, starts

KEPT = 50_000_000  # bytes of words that have been met, at most
TOGETHER = 64  # words that the tokenizer is given as one text


class Encoder:
    """What turns texts into ids.

    Args:
        tokenizer: byte-level BPE, as `load_tokenizer` opens it.
        sizes: [V] int64, how many bytes of text each id stands for.
        dtype: of the ids.
    """

    def __init__(self, tokenizer, sizes: np.ndarray, dtype: np.dtype):
        self.tokenizer, self.sizes, self.dtype = tokenizer, sizes, dtype
        self._forget()

    def __call__(self, texts: Sequence[str]) -> Found:
        """The ids of all texts, one after the other, and how many each text has, int64."""
        if self.known.size > KEPT:
            self._forget()
        plain = np.array([common(text) for text in texts], bool)
        ours, rare = apart(texts, plain)
        found = self._by_words(ours)
        return joined(plain, found, self._asked(rare)) if rare else found

    def _forget(self) -> None:
        self.known = Known(self.dtype)
        self.known.add([STOP], np.zeros(0, self.dtype), np.zeros(1, np.int64))

    def _by_words(self, texts: list[str]) -> Found:
        data = b"".join([text.encode() + STOP for text in texts])
        codes = np.frombuffer(data, np.uint8)
        begins = starts(codes)
        lengths = np.diff(begins, append=len(codes))
        words = self.known.find(data, begins, lengths)
        if len(new := np.flatnonzero(words < 0)):
            places = zip(begins[new].tolist(), lengths[new].tolist(), strict=True)
            self._learn(list({data[begin : begin + length] for begin, length in places}))
            words[new] = self.known.find(data, begins[new], lengths[new])
        ids, ends = self.known.ids(words)
        return ids, np.diff(ends[codes[begins] == STOP[0]], prepend=0)

    def _learn(self, words: list[bytes]) -> None:
        """Ask for words that are not known: such as begin with a space, many in one text, where each is split off."""
        for joins in (True, False):
            some = [word for word in words if joins == (word[:1] == b" " and not word.decode().isspace())]
            groups = [some[i : i + TOGETHER] for i in range(0, len(some), TOGETHER)] if joins else [[w] for w in some]
            ids, _ = self._asked([b"".join(group).decode() for group in groups])
            ends = np.cumsum(self.sizes[ids])
            wanted = np.cumsum([len(word) for word in some])
            last = np.searchsorted(ends, wanted)
            if not np.array_equal(ends[last], wanted):
                raise ValueError(f"the tokenizer splits {b''.join(some)[:100]!r} into other words than GPT-2's does")
            self.known.add(some, ids, np.diff(last + 1, prepend=0))

    def _asked(self, texts: list[str]) -> Found:
        found = [np.array(each.ids, self.dtype) for each in self.tokenizer.encode_batch_fast(texts)]
        return np.concatenate([np.zeros(0, self.dtype), *found]), np.array([len(ids) for ids in found], np.int64)

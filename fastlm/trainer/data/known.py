"""Words that have been met, and the ids of each, in a hash table that is asked for many words at once."""

import numpy as np

from fastlm.backends.splitmix import mixed

SHORT = 15  # bytes of a word that two numbers of 64 bits hold beside how many they are
PADDING = b"\0" * 16  # so that as many bytes can be read from where any word begins
MASKS = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)
SPARSE = 4  # places in the table for a word, at least
OVERHEAD = 100  # bytes that a word takes here, about, and a long one besides those of its own


class Known:
    """Words by their numbers, from 0 on. dtype: of ids.

    Attributes:
        number: how many there are; total: their ids; size: the bytes that they take, about.
    """

    def __init__(self, dtype: np.dtype):
        self.keys = np.zeros((2, 1), np.uint64)  # of short words; of others zeros
        self.long: dict[bytes, int] = {}
        self.table = np.full(1 << 12, -1, np.int32)  # a word's number is at its hash, or after it where that is taken
        self.begins, self.counts, self.flat = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, dtype)
        self.number, self.total, self.size = 0, 0, 0

    def find(self, data: bytes, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The number of each word of data, -1 for one that is not known.

        Args:
            data: text in UTF-8.
            begins, lengths: [n] int64, of the words in it.
        """
        keys = _keys(data, begins, lengths)
        at = self._places(keys)
        found = self.table[at].astype(np.int64)
        left = np.flatnonzero(self._others(found, keys))
        while len(left):
            at[left] = (at[left] + 1) % len(self.table)
            found[left] = self.table[at[left]]
            left = left[self._others(found[left], keys[:, left])]
        for i in np.flatnonzero(lengths > SHORT).tolist():
            found[i] = self.long.get(data[begins[i] : begins[i] + lengths[i]], -1)
        return found

    def add(self, words: list[bytes], ids: np.ndarray, counts: np.ndarray) -> None:
        """New words, each once; the ids of all of them, and how many each has."""
        first = self.number
        lengths = np.array([len(word) for word in words], np.int64)
        keys = _keys(b"".join(words), np.cumsum(lengths) - lengths, lengths)
        self.keys = _put(self.keys, first, keys)
        self.begins = _put(self.begins, first, self.total + np.cumsum(counts) - counts)
        self.counts = _put(self.counts, first, counts)
        self.flat = _put(self.flat, self.total, ids)
        self.long.update((word, i) for i, word in enumerate(words, first) if len(word) > SHORT)
        self.number, self.total = first + len(words), self.total + len(ids)
        self.size += OVERHEAD * len(words) + int((lengths + OVERHEAD)[lengths > SHORT].sum())
        if SPARSE * self.number > len(self.table):
            self.table = np.full(1 << (2 * SPARSE * self.number).bit_length(), -1, np.int32)
            first = 0
        self._enter(first + np.flatnonzero(self.keys[1, first : self.number]))

    def ids(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words by number, [n], one after the other, and where those of each end."""
        counts = self.counts[words]
        ends = np.cumsum(counts)
        places = np.repeat(self.begins[words] - ends + counts, counts)
        places += np.arange(len(places))
        return self.flat[places], ends

    def _enter(self, numbers: np.ndarray) -> None:
        at = self._places(self.keys[:, numbers])
        while len(numbers):
            free = self.table[at] < 0
            self.table[at[free]] = numbers[free]  # of several for one place, one is there then
            left = self.table[at] != numbers
            numbers, at = numbers[left], (at[left] + 1) % len(self.table)

    def _places(self, keys: np.ndarray) -> np.ndarray:
        return (mixed(keys[0] + mixed(keys[1])) % np.uint64(len(self.table))).astype(np.int64)

    def _others(self, found: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Whether another word than that of the keys was found."""
        return (found >= 0) & ((self.keys[0, found] != keys[0]) | (self.keys[1, found] != keys[1]))


def _put(array: np.ndarray, at: int, more: np.ndarray) -> np.ndarray:
    """[..., N] with more [..., n] from a place on, with twice the room where there is too little."""
    end = at + more.shape[-1]
    if end > array.shape[-1]:
        larger = np.zeros((*array.shape[:-1], 2 * end), array.dtype)
        larger[..., :at] = array[..., :at]
        array = larger
    array[..., at:end] = more
    return array


def _keys(data: bytes, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[2, n] uint64: the bytes of short words, and how many; zeros for others."""
    eight = np.ndarray(len(data) + 8, "<u8", data + PADDING, strides=1)  # from each byte on
    keys = np.zeros((2, len(begins)), np.uint64)
    keys[0] = eight[begins] & MASKS[np.minimum(lengths, 8)]
    more = np.flatnonzero(lengths > 8)
    keys[1] = lengths.astype(np.uint64) << np.uint64(56)
    keys[1, more] |= eight[begins[more] + 8] & MASKS[np.minimum(lengths[more] - 8, 7)]
    keys[:, lengths > SHORT] = 0
    return keys

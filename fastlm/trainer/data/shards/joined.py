"""Many files of ids as one stream that is read where it is asked for, by memory map."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

OPEN = 256  # files mapped at a time


class Joined:
    """Files of ids one after the other, as an array [N].

    Args:
        files: (path, tokens in it) each, none of them empty.
        dtype: of the ids.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], dtype: np.dtype):
        self.files, self.dtype = [path for path, _ in files], dtype
        self.ends = np.cumsum([tokens for _, tokens in files], dtype=np.int64)
        self._mapped = lru_cache(OPEN)(self._map)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        """Tokens by their places from 0 on, or a slice of them, as an array in memory."""
        places = np.arange(*at.indices(len(self))) if isinstance(at, slice) else np.asarray(at)
        of_file = np.searchsorted(self.ends, places, side="right")
        found = np.empty(places.shape, self.dtype)
        for number in np.unique(of_file):
            here = of_file == number
            begin = self.ends[number - 1] if number else 0
            found[here] = self._mapped(number)[places[here] - begin]
        return found

    def _map(self, number: int) -> np.ndarray:
        return np.memmap(self.files[number], self.dtype, "r")

"""The course of a run: how many micro-batches each update has, and which stage of row lengths it is in. Pure functions
of the update's number, so that a run that goes on, on any number of ranks, takes the same rows.

A growing batch changes the number of micro-batches and never their shape. Brown et al. (2020) let it grow linearly in
the tokens seen; then its growth is in proportion to itself, which in updates is A^(s / R): from one micro-batch at
update 0 to all A of them at update R.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class Course:
    """Args:
    steps: updates of the run.
    batch: rows of a micro-batch.
    accumulate: micro-batches of an update.
    ramp: share of the updates over which an update grows from one micro-batch to so many. Default 0.
    ends: shares of the updates at which stages end, but for the last one's. Default none: there is one stage.
    """

    def __init__(self, steps: int, batch: int, accumulate: int, ramp: float = 0.0, ends: Sequence[float] = ()):
        self.steps, self.batch, self.accumulate = steps, batch, accumulate
        growing = round(ramp * steps)
        self._grown = np.rint(accumulate ** (np.arange(growing) / max(1, growing))).astype(np.int64)
        self._before = np.concatenate([[0], self._grown.cumsum()])
        self._ends = [round(share * steps) for share in ends]

    def micro_batches(self, step: int) -> int:
        """Of the update that follows so many."""
        return int(self._grown[step]) if step < len(self._grown) else self.accumulate

    def rows_before(self, step: int) -> int:
        """Rows of the first `step` updates; also the number of the next sample."""
        whole = max(0, step - len(self._grown)) * self.accumulate
        return self.batch * (int(self._before[min(step, len(self._grown))]) + whole)

    def stage(self, step: int) -> int:
        """The number of the stage that the update after so many is in."""
        return bisect_right(self._ends, step)

    def rows_of_stages(self, step: int) -> list[int]:
        """`rows_before`, by stages."""
        ends = [0, *(min(step, end) for end in self._ends), step]
        return [self.rows_before(after) - self.rows_before(before) for before, after in pairwise(ends)]

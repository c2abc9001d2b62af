"""metrics.jsonl: what happened at each step, one row after the other."""

import json
import math
import os
import sys
from pathlib import Path

import torch

from fastlm.trainer.disk import flush, write_file
from fastlm.trainer.outputs.logs import Log
from fastlm.trainer.step import Update

GIVE_UP = 25  # updates skipped one after the other; in fp16 each halves the loss scale, which begins at 65,536


class Metrics:
    """metrics.jsonl: a row for each update, and rows for evaluations and samples, each with the step it belongs to.

    Rows of updates wait as device tensors until `flush`, so that logging does not keep the device idle. Opening the
    file for a run at `step` drops the rows after it, and a last line that a kill left unfinished. A number that is not
    finite, or that nobody looked at, is null.

    writes: whether this process writes the file, which others of the same run read and go on from in memory. log: where
    its rows go too.
    last: field → newest value, and held_out_step, the step of the newest evaluation. opened_with: the fields that there
    were for `step`. diverged: the first step whose loss was not finite and whose update was made all the same, or None.
    skipped: updates that were skipped, for their gradients were not finite. clipped: the share of updates whose
    gradient was clipped; None where none was to be.
    """

    def __init__(self, path: Path, step: int, writes: bool = True, log: Log | None = None):
        self.path, self.writes, self.log = path, writes, log
        kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
        if writes:
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.opened_with = {name for row in kept if row["step"] == step for name in row}
        self.last: dict = {}
        self.diverged: int | None = None
        self.skipped, self._in_a_row = 0, 0
        self._clipped = [0, 0]  # how many, of how many
        self._remember(kept)
        self._waiting: list[tuple[dict, Update]] = []
        self._before = 0.0

    def add(self, step: int, seconds: float, updating: float, update: Update) -> None:
        """A row for the update that made `step`, `seconds` into the run, `updating` of which this process has spent on
        updates alone.
        """
        speed = update.tokens / max(1e-9, updating - self._before)
        self._before = updating
        row = {
            "step": step, "tokens": update.seen, "seconds": round(seconds, 3),
            "tokens_per_second": round(speed), "memory": resident_bytes(), "lr": update.lr, "targets": update.targets,
        }  # fmt: skip
        self._waiting.append((row, update))

    def write(self, row: dict) -> None:
        """A row after those that wait."""
        self.flush()
        self._append([row])

    def flush(self, to_disk: bool = False) -> None:
        """Write the rows that wait; the numbers of all of them come from the device in one transfer."""
        if self._waiting:
            names = [*self._waiting[0][1].losses, "grad_norm", "clipped", "loss_scale", "skipped"]
            table = torch.stack([_numbers(update) for _, update in self._waiting]).tolist()
            rows = [
                row | dict(zip(names, numbers, strict=True))
                for (row, _), numbers in zip(self._waiting, table, strict=True)
            ]
            self._append(rows)
            self._waiting = []
            lost = (row["step"] for row in rows if not math.isfinite(row["loss"]) and row["skipped"] != 1)
            self.diverged = self.diverged or next(lost, None)
        if to_disk and self.writes:
            flush(self.path)

    def skipping(self, steps: int) -> bool:
        """Whether a run of so many steps is lost: GIVE_UP updates were skipped one after the other, or most of all."""
        return self._in_a_row >= GIVE_UP or (self.last.get("step") == steps and 2 * self.skipped > steps)

    @property
    def clipped(self) -> float | None:
        return self._clipped[0] / self._clipped[1] if self._clipped[1] else None

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def series(self, *names: str) -> list[tuple]:
        """The rows written so far that have a value in all these fields, as tuples of them."""
        return [
            tuple(row[n] for n in names) for row in read_rows(self.path) if all(row.get(n) is not None for n in names)
        ]

    def _append(self, rows: list[dict]) -> None:
        rows = [{name: _finite(value) for name, value in row.items()} for row in rows]
        if self.writes:
            before = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            except OSError:  # a full disk took some of them, maybe half a row
                os.truncate(self.path, before)
                raise
        for row in rows if self.log is not None else ():
            self.log.write(row)
        self._remember(rows)

    def _remember(self, rows: list[dict]) -> None:
        for row in rows:
            self.last |= row | ({"held_out_step": row["step"]} if "held_out_loss" in row else {})
            if row.get("clipped") is not None:
                self._clipped = [self._clipped[0] + (row["clipped"] == 1), self._clipped[1] + 1]
            if "skipped" in row:
                self.skipped += row["skipped"] == 1
                self._in_a_row = self._in_a_row + 1 if row["skipped"] == 1 else 0


def _numbers(update: Update) -> torch.Tensor:
    """Losses, gradient norm, 1 if it was clipped, loss scale, and 1 if the update was skipped; NaN for what the update
    did not look at.
    """
    unknown = torch.full_like(update.scale, math.nan)
    looked_at = (update.norm, update.clipped, update.scale, update.overflow)
    others = (unknown if x is None else x for x in looked_at)
    return torch.stack([x.float() for x in (*update.losses.values(), *others)])


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def read_rows(path: Path) -> list[dict]:
    """The whole rows of a metrics.jsonl; what follows a line that was cut or damaged is not read."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


def resident_bytes() -> int:
    """Memory this process holds now (its peak, where only that is known; 0 where nothing is)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Where else the rows of metrics.jsonl go: --log tensorboard, --log wandb. Nothing does unless it is asked for, and
nothing leaves the machine unless WANDB_MODE says so. To add one, subclass `Log` with a name, here or in a plugin.
"""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import ClassVar

from fastlm.trainer.words import Refusal

LOGS: dict[str, type["Log"]] = {}


class Log:
    """A second home of a run's numbers.

    Args:
        folder: the run's.
        step: that the run goes on from; what was written of later ones does not count.
        config: of the run, values that JSON has.

    Attributes:
        name: its name in LOGS.
        package: that it needs.
    """

    name: ClassVar[str]
    package: ClassVar[str]

    def __init_subclass__(cls, name: str, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.name = name
        LOGS[name] = cls

    def __init__(self, folder: Path, step: int, config: dict):
        raise NotImplementedError

    def write(self, row: dict) -> None:
        """A row of metrics.jsonl, with its step."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what waits."""
        raise NotImplementedError


def check(name: str) -> None:
    """Raises Refusal if what a log needs is not installed."""
    package = LOGS[name].package
    if importlib.util.find_spec(package) is None:
        raise Refusal(f"--log {name} needs {package}, not installed here; cure: pip install {package}")


def numbers(row: dict) -> dict[str, float]:
    return {key: x for key, x in row.items() if key != "step" and isinstance(x, (int, float))}


class TensorBoard(Log, name="tensorboard"):
    """Event files in the run's tensorboard/, for `tensorboard --logdir`."""

    package = "tensorboard"

    def __init__(self, folder: Path, step: int, config: dict):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: dict) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        if row.get("sample"):
            self._writer.add_text("sample", row["sample"], row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Log, name="wandb"):
    """Files in the run's wandb/, for `wandb sync`; at once over the network where WANDB_MODE=online asks for it."""

    package = "wandb"

    def __init__(self, folder: Path, step: int, config: dict):
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        known_by = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
        options = dict(project="fastlm", name=folder.name, id=known_by, resume="allow")
        self._run = wandb.init(dir=str(folder), config=config, **options)

    def write(self, row: dict) -> None:
        text = {"sample": row["sample"]} if row.get("sample") else {}
        self._run.log(numbers(row) | text, step=row["step"])

    def close(self) -> None:
        self._run.finish()

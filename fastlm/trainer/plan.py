"""run.json: all that a resumed run must not decide anew. Written before step 1, never changed."""

import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path

import torch

from fastlm.backends.info import device_name
from fastlm.trainer.budget import Looks
from fastlm.trainer.data.tokens import sha256
from fastlm.trainer.disk import LOCK, locked, write_file
from fastlm.trainer.distributed.ranks import ALONE, Ranks
from fastlm.trainer.options import plugins
from fastlm.trainer.options.config import Config
from fastlm.trainer.options.finetune import FineTune
from fastlm.trainer.options.training import Training
from fastlm.trainer.outputs.logs import LOGS
from fastlm.trainer.words import Refusal, command, disk_words, processes

CONFIGURATIONS: dict[str, type[Config] | type[FineTune]] = {kind.command: kind for kind in (Config, FineTune)}
BEFORE = (LOCK, "tokenizer.json", "metrics.jsonl")  # what there is of a run until it has a run.json


@dataclass(frozen=True)
class Plan:
    """fingerprint: of the data. tokenizer: SHA-256 of tokenizer.json. environment: name → words, for people."""

    fastlm: str
    command: str
    config: Training
    steps: int
    looks: Looks
    threads: int
    fingerprint: str
    tokenizer: str
    environment: dict[str, str]

    def write(self, folder: Path) -> None:
        write_file(folder / "run.json", self.to_json())

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"config": self.config.to_json()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises ValueError, TypeError or KeyError for a text that is no plan."""
        values = json.loads(text)
        config = CONFIGURATIONS[values["config"].get("command", "pretrain")].from_json(values["config"])
        return cls(**values | {"config": config, "looks": Looks(**values["looks"])})

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Raises Refusal if the folder holds no run."""
        path = folder / "run.json"
        if not path.exists():
            raise Refusal(
                f"{folder} holds no run (no run.json), or one that was stopped before its first step; "
                "`fastlm pretrain` starts one"
            )
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(
                f"{path} cannot be understood ({error}); it was altered, or written by another version of fastlm"
            ) from error


@contextmanager
def new_folder(out: Path | None, ranks: Ranks = ALONE) -> Iterator[Path]:
    """The folder of a new run, which the first rank makes; arguments and errors as in `_new_folder`."""
    if not ranks.speaks:
        yield Path(ranks.told(""))
        return
    with _new_folder(out) as folder:
        ranks.told(str(folder))
        yield folder


@contextmanager
def _new_folder(out: Path | None) -> Iterator[Path]:
    """Make the folder of a new run and keep others out: `out`, or one named by the time. If no run.json is written
    there, it goes again with what was.

    Raises Refusal if it holds anything, cannot be made or written to, or is another process's.
    """
    wanted = out or Path("runs")
    try:
        _check_free(out)
        absent = [path for path in (wanted, *wanted.parents) if not path.exists()]
        folder = _make(out)
    except OSError as error:
        raise Refusal(f"--out {wanted} cannot be made ({error.strerror}); give another folder") from error
    with locked(folder):
        _check_free(out)  # again: another process may have come and gone
        try:
            yield folder
        except OSError as error:
            raise Refusal(disk_words(error, folder, "nothing was begun", "begin again")) from error
        finally:
            if not (folder / "run.json").exists():
                for name in BEFORE:
                    (folder / name).unlink(missing_ok=True)
                for name in ("state", *LOGS):  # of weights to begin with, and of what logs had opened
                    shutil.rmtree(folder / name, ignore_errors=True)
                for path in absent if out else (folder, *absent):
                    with suppress(OSError):
                        path.rmdir()


def _check_free(out: Path | None) -> None:
    if out is None or not out.exists():
        return
    if (out / "run.json").exists():
        raise Refusal(
            f"--out {out} already holds a run; `{command('resume', out)}` goes on with it, or give another folder"
        )
    if not out.is_dir() or any(path.name != LOCK for path in out.iterdir()):
        raise Refusal(f"--out {out} is not an empty folder; give another one")


def _make(out: Path | None) -> Path:
    """`out`, or a new runs/<date-time>, numbered if another run began in the same second."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    named = Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    for suffix in chain([""], map("-{}".format, count(2))):
        with suppress(FileExistsError):
            folder = named.with_name(named.name + suffix)
            folder.mkdir(parents=True)
            return folder


@contextmanager
def keeping(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep processes of no rank out of a run's folder; errors as in `locked`."""
    with locked(folder) if ranks.speaks else nullcontext():
        yield


def environment(config: Training) -> dict[str, str]:
    """What a result may depend on besides the configuration, in words."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(config.torch_device()),
        "system": platform.platform(terse=True),
        "processes": str(processes()),
        **{f"plugin {name}": f"SHA-256 {sha256(Path(name))[:12]}" for name in config.plugin if plugins.is_file(name)},
    }

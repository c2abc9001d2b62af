"""run.json: all that a resumed run must not decide anew. Written before step 1, never changed."""

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastlm.checkpoint import write_file
from fastlm.config import Config
from fastlm.machine import device_name
from fastlm.words import Refusal


@dataclass(frozen=True)
class Plan:
    """fingerprint: of the data. tokenizer: SHA-256 of tokenizer.json. environment: name → words, for people."""

    fastlm: str
    command: str
    config: Config
    steps: int
    threads: int
    fingerprint: str
    tokenizer: str
    environment: dict[str, str]

    def write(self, folder: Path) -> None:
        write_file(folder / "run.json", json.dumps(asdict(self) | {"config": self.config.to_json()}, indent=1))

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Raises Refusal if the folder holds no run."""
        path = folder / "run.json"
        if not path.exists():
            raise Refusal(f"{folder} holds no run (no run.json), or one that was stopped before its first step; `fastlm pretrain` starts one")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values | {"config": Config.from_json(values["config"])})
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(f"{path} cannot be understood ({error}); it was altered, or written by another version of fastlm") from error


def free_folder(out: Path | None) -> Path:
    """The folder to write: `out`, or a new one named by the time. Raises Refusal if it holds anything."""
    folder = out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if (folder / "run.json").exists():
        raise Refusal(f"--out {folder} already holds a run; `fastlm resume {folder}` goes on with it, or give another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"--out {folder} is not an empty folder; give another one")
    return folder


def environment(config: Config) -> dict[str, str]:
    """What a result may depend on besides the configuration, in words."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(config.torch_device()),
        "system": platform.platform(terse=True),
    }

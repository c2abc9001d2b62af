"""What the training room's tests share: a tiny text, a tiny model, runs in this process and in others, and what of a
run must repeat.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.trainer import cli
from fastlm.trainer.commands import run
from fastlm.trainer.options.config import Config
from fastlm.trainer.outputs.metrics import read_rows
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import flag

TINY = dict(
    vocab=300,
    context=16,
    dim=32,
    layers=1,
    heads=2,
    batch=4,
    threads=1,
    steps=12,
    evaluations=3,
    lr=5e-3,
    weight_decay=0.1,
)
SAMPLE = 8  # tokens of one, in the trainer's tests
CLOCK = ("seconds", "tokens_per_second", "memory")  # fields of a row that a clock or the machine's load makes


def write_text(path: Path, seed: int, lines: int = 600) -> None:
    """A file of 20 kB in which words follow a simple grammar."""
    draw = random.Random(seed)
    names, verbs = ["Ada", "Alan", "Grace", "Edsger"], ["proves", "writes", "reads"]
    path.write_text(
        "".join(
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.randint(1, 99)} lines of code.\n" for _ in range(lines)
        )
    )


def config(text: Path, out: Path | None = None, **changes) -> Config:
    return Config(**TINY | dict(data=(text,), out=out) | changes)


def flags(config: Config) -> list[str]:
    """The command line that asks for `config`."""
    default, words = Config(), []
    for name, value in config.to_json().items():
        if value != default.to_json()[name]:
            words += [flag(name), *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def train(text: Path, out: Path, **changes) -> int:
    before = torch.get_num_threads()
    try:
        return run.pretrain(config(text, out, **changes), ["pytest"])
    finally:
        torch.set_num_threads(before)


def train_in(folder: Path, **runs: dict) -> Path:
    """Runs over a text of their own, folder/text.txt, each in a folder of its name there, as is their cache."""
    write_text(folder / "text.txt", seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, changes in runs.items():
            assert train(folder / "text.txt", folder / name, **changes) == 0
    return folder


def repeatable(folder: Path) -> tuple[bytes, list[dict]]:
    """The final weights' bytes, and the rows of metrics.jsonl without what a clock made."""
    rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(folder / "metrics.jsonl")]
    return (folder / "model.safetensors").read_bytes(), rows


def stop_before(patch: pytest.MonkeyPatch, step: int) -> list[Trainer]:
    """Have a run stop once, before the update that follows so many; the list then has its trainer."""
    update, stopped = Trainer.update, []

    def stopping(trainer: Trainer):
        if trainer.step == step and not stopped:
            stopped.append(trainer)
            raise KeyboardInterrupt
        return update(trainer)

    patch.setattr(Trainer, "update", stopping)
    return stopped


def python(code: str, *argv: str, **options) -> subprocess.CompletedProcess:
    """Run code in another process."""
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120, **options)


def fail(capsys, *argv: str) -> str:
    """Run a command that must be refused; return its one line."""
    assert cli.main(argv) == 2
    complaint = capsys.readouterr().err.removeprefix(f"fastlm {fastlm.__version__}\n")
    assert complaint.startswith("fastlm: ") and complaint.count("\n") == 1, complaint
    return complaint


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())

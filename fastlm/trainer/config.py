"""Everything a run can be asked for: one dataclass, from which the command line's flags are made."""

import os
from collections import ChainMap
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from fastlm.models import ModelConfig
from fastlm.models.presets import DEFAULT, PRESETS, preset
from fastlm.objectives import OBJECTIVES
from fastlm.optim import OPTIMIZERS
from fastlm.positions import SCHEMES
from fastlm.trainer import plugins
from fastlm.trainer.data.tokenizer import SPECIALS
from fastlm.trainer.schedule import SCHEDULES
from fastlm.trainer.words import Refusal, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REGISTRIES = {"preset": PRESETS, "position": ChainMap(SCHEMES, {"preset": None}), "objective": OBJECTIVES, "optimizer": OPTIMIZERS,
              "schedule": SCHEDULES}  # fmt: skip
AT_LEAST = {"vocab": 256 + len(SPECIALS), "steps": 1, "batch": 1, "accumulate": 1, "threads": 1, "evaluations": 0, "seed": 0,
            "lr": 0, "weight_decay": 0, "clip": 0, "save_every": 0}  # fmt: skip
AT_MOST = {"seed": 2**63 - 1, "threads": 16 * (os.cpu_count() or 1)}  # OpenMP dies of far too many threads
# peak rates for a small model; else 1e-3
LR = {"adamw": 2.5e-3, "adam": 2.5e-3, "adafactor": 6e-2, "lamb": 3e-2, "sgd": 0.1}
DECAY = {"adam": 0.0, "sgd": 0.0}  # which add it to the gradient, where 0.1 drowns the rest; else 0.1


@dataclass(frozen=True)
class Config:
    """Train a language model from nothing. Without a flag: two minutes on Python's own source code, on the machine at
    hand."""

    preset: Literal[tuple(PRESETS)] = DEFAULT
    """The model's kind; the flags below change its shape."""
    position: Literal[("preset", *SCHEMES)] = "preset"
    """Positional scheme; preset for the preset's own."""
    optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"
    objective: Literal[tuple(OBJECTIVES)] = "causal"
    plugin: tuple[str, ...] = ()
    """Modules or .py files to import first; what they register can be chosen here."""
    data: tuple[Path, ...] = ()
    """Files and folders of .txt, .md, .py, .jsonl, each also as .gz; nothing for the standard library's sources."""
    minutes: float = 2.0
    """Wall time to train for. The first seconds are measured and fix the number of steps."""
    steps: int | None = None
    """Train for exactly this many updates instead."""
    seed: int = 0
    out: Path | None = None
    """Folder to write; None for runs/<date-time>."""

    vocab: int = 2048
    """Size of the byte-level BPE vocabulary."""
    context: int | None = None
    """Tokens in a row; this and the next four: None for the preset's."""
    dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    dropout: float | None = None

    batch: int = 8
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an update."""
    lr: float | None = None
    """Peak learning rate; None for the optimizer's."""
    schedule: Literal[tuple(SCHEDULES)] = "cosine"
    warmup: float = 0.05
    """Share of the steps on which the rate climbs."""
    floor: float = 0.1
    """Share of the peak rate at which the schedule ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float | None = None
    """None for the optimizer's."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    dtype: Literal[tuple(DTYPES)] = "fp32"
    """What matrix products are computed in; parameters stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads; None to try one and all cores."""
    evaluations: int = 12
    """How often to look at held-out text; at each quarter in any case."""
    save_every: float = 30.0
    """Seconds between checkpoints. Results do not depend on it."""

    def model(self, vocab_size: int) -> ModelConfig:
        """The preset with this run's changes. Raises ValueError for shapes that do not fit together."""
        changes = {name: getattr(self, name) for name in ("position", "context", "dim", "layers", "heads", "dropout")}
        changes = {name: value for name, value in changes.items() if value not in (None, "preset")}
        return preset(self.preset, vocab_size=vocab_size, **changes)

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def settled(self) -> "Config":
        """The same with what the machine, the folder or another flag decides written out, so that it can be
        repeated."""
        paths = {"data": tuple(p.resolve() for p in self.data)}
        paths |= {"plugin": tuple(str(Path(name).resolve()) if plugins.is_file(name) else name for name in self.plugin)}
        optimizer = {"lr": LR.get(self.optimizer, 1e-3), "weight_decay": DECAY.get(self.optimizer, 0.1)}
        optimizer = {name: value for name, value in optimizer.items() if getattr(self, name) is None}
        return replace(self, device=self.torch_device().type, **paths, **optimizer)

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values no run can have."""
        for name, known in REGISTRIES.items():
            value = getattr(self, name)
            if value not in known:
                raise Refusal(
                    f"--{name} {value} is unknown{did_you_mean(value, known)}; choose from {', '.join(known)}"
                )
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):  # NaN is refused too
                raise Refusal(f"--{name.replace('_', '-')} is {value}; it must be at least {least}, and finite")
        for name, most in AT_MOST.items():
            if (getattr(self, name) or 0) > most:
                raise Refusal(f"--{name} is {getattr(self, name)}; it must be at most {most}")
        if not 0 < self.minutes < float("inf"):
            raise Refusal(f"--minutes is {self.minutes:g}; it must be above 0")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refusal(f"--{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Refusal(f"--betas are {self.betas[0]} {self.betas[1]}; each must be at least 0 and below 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Refusal("--device cuda, but torch sees no GPU; `fastlm info` says more")
        try:
            self.model(self.vocab)
        except ValueError as error:
            raise Refusal(str(error)) from error

    def to_json(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"data": [str(p) for p in self.data], "out": None if self.out is None else str(self.out)}

    @classmethod
    def from_json(cls, values: dict) -> "Config":
        paths = {"data": tuple(map(Path, values["data"])), "out": values["out"] and Path(values["out"])}
        return cls(**values | paths | {name: tuple(values[name]) for name in ("betas", "plugin")})

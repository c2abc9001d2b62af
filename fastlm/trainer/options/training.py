"""What every run that trains can be asked for, whatever it learns."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Suppress, arg

from fastlm.trainer.options import plugins
from fastlm.trainer.options.assigned import assigned
from fastlm.trainer.options.choices import REGISTRIES, choices
from fastlm.trainer.schedule import SCHEDULES, Moment, defaults
from fastlm.trainer.words import Refusal, did_you_mean, flag

if TYPE_CHECKING:  # torch takes seconds, for which a mistyped flag need not wait
    import torch

    from fastlm.models import ModelConfig
    from fastlm.trainer.course import Course

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # what torch calls them
SHARDS = ("none", "optimizer", "gradients", "parameters")  # what several processes divide
BATCH = 8  # rows of a micro-batch
LR = {"adamw": 2.5e-3, "adam": 2.5e-3, "adafactor": 6e-2, "lamb": 3e-2, "sgd": 0.1}  # peak rates for a small model
OTHER_LR = 1e-3  # of a plugin's optimizer
DECAY = {"adam": 0.0, "sgd": 0.0}  # which add it to the gradient, where 0.1 drowns the rest
OTHER_DECAY = 0.1
OTHERWISE = {
    "position": ("preset",),
    "objective": ("preset",),
    "kind": ("columns",),
    "log": ("none",),
}  # what decides unless it is said
TUPLES = ("betas", "plugin", "schedule_options", "objective_options", "lengths", "weights")  # which JSON has as lists


def unset(kind: str | None, meaning: str) -> arg:
    """How --help shows a flag that is None unless given: what it takes, and what None means."""
    return arg(metavar=kind, help_behavior_hint=f"(default: {meaning})")


@dataclass(frozen=True)
class Training:
    """The part of a configuration that says how a run trains.

    Attributes:
        command: whose flags these are.
        at_least: field → its least value; at_most: likewise.
    """

    command: ClassVar[str]
    at_least: ClassVar[dict[str, float]] = {
        "steps": 1, "batch": 1, "accumulate": 1, "threads": 1, "evaluations": 0, "patience": 1, "seed": 0, "dropout": 0,
        "layer_decay": 0, "pull": 0, "lr": 0, "weight_decay": 0, "clip": 0, "save_every": 0,
    }  # fmt: skip
    # OpenMP dies of far too many threads
    at_most: ClassVar[dict[str, float]] = {"seed": 2**63 - 1, "layer_decay": 1, "threads": 16 * (os.cpu_count() or 1)}

    optimizer: Literal[choices("optimizer")] = "adamw"
    """What turns gradients into updates."""
    plugin: Annotated[tuple[str, ...], unset("MODULE...", "none")] = ()
    """Modules or .py files to import first; what they register can be chosen here."""
    seed: int = 0
    """Of weights, batches, dropout and samples; the same one gives the same run."""
    out: Annotated[Path | None, unset("PATH", "runs/<date-time>")] = None
    """Folder to write."""
    steps: Annotated[int | None, unset("INT", "what fits in the minutes")] = None
    """Train for exactly this many updates, whatever time that takes."""
    batch: int = BATCH
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an update."""
    lr: Annotated[float | None, unset("FLOAT", ", ".join(f"{rate:g} for {name}" for name, rate in LR.items()))] = None
    """Peak learning rate; small models whose norms come last, such as bert, get a share of the default."""
    schedule: Literal[choices("schedule")] = "cosine"
    """How the rate falls after its peak."""
    schedule_options: Annotated[tuple[str, ...], unset("NAME=VALUE...", "the schedule's")] = ()
    """Options of the schedule, such as until=0.9 of cosine, power=1.5 of polynomial, or decay=0.1 shape=sqrt of wsd."""
    schedule_by: Literal["updates", "tokens"] = "updates"
    """What the schedule and its warmup count, which differ where updates grow."""
    warmup: float = 0.05
    """Share of the run on which the rate climbs."""
    min_lr_ratio: float = 0.1
    """Share of the peak rate at which the schedule ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How much of the last means of gradients and of their squares Adam's kind keeps at each step."""
    weight_decay: Annotated[float | None, unset("FLOAT", f"{OTHER_DECAY:g}; 0 for {' and '.join(DECAY)}")] = None
    """How strongly weights are drawn to zero."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    layer_decay: float = 1.0
    """What the rate is multiplied by from a layer to the one below; 1 lets all layers learn alike."""
    pull: float = 0.0
    """How strongly weights are drawn back to those that the run began with (L2-SP), as weight decay draws them to zero;
    0 for not at all."""
    dropout: Annotated[float | None, unset("FLOAT", "the preset's; 0.0 for llama")] = None
    """Share of activations left out in training; for small models, such as bert, the preset's is 0."""
    dtype: Literal[tuple(DTYPES)] = "fp32"
    """What matrix products are computed in; parameters stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    shard: Literal[SHARDS] = "none"
    """What processes that torchrun starts divide among them: ZeRO 1, 2 and 3."""
    threads: Annotated[int | None, unset("INT", "the faster of one and all cores")] = None
    """CPU threads."""
    evaluations: int = 12
    """How often to look at held-out text; at each quarter in any case."""
    patience: Annotated[int | None, unset("INT", "all steps are trained")] = None
    """End when so many evaluations in a row find no better held-out loss; the best weights are kept in best/."""
    log: Literal[("none", *choices("log"))] = "none"
    """Where rows of metrics.jsonl go too: tensorboard/ or wandb/ in the folder; wandb is offline unless WANDB_MODE is
    set."""
    save_every: float = 30.0
    """Seconds between checkpoints. Results do not depend on it."""
    shape: Suppress[dict | None] = None
    """No flag: the fields of the `ModelConfig` that was found in the folder whose weights the run begins with."""

    @property
    def source(self) -> Path | None:
        """The folder whose weights a run begins with."""
        raise NotImplementedError

    @property
    def tokens_at_once(self) -> int | None:
        """Ids of a micro-batch with its padding, at most; None where it has `batch` rows."""
        return None

    def rows_at_once(self, context: int) -> int:
        """How many of the longest rows a micro-batch has, at most."""
        if self.tokens_at_once is None:
            return self.batch
        return min(self.batch * self.accumulate, max(1, self.tokens_at_once // context))

    def torch_device(self) -> "torch.device":
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def sketch(self, vocab_size: int) -> "ModelConfig":
        """The shape of the model, without the memory that its positional scheme's parameters would take."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        try:
            with FakeTensorMode():
                return self.model(vocab_size)
        except RuntimeError:  # a plugin's scheme looks at its numbers
            return self.model(vocab_size)

    def check_values(self) -> None:
        """Raises Refusal, naming the flag and the cure, for what can be told of values before torch is there."""
        for name in filter(self.__dataclass_fields__.__contains__, REGISTRIES):
            value, known = getattr(self, name), (*choices(name), *OTHERWISE.get(name, ()))
            if value not in known:
                raise Refusal(
                    f"--{name} {value} is unknown{did_you_mean(value, known)}; choose from {', '.join(known)}"
                )
        for name, least in self.at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):  # NaN is refused too
                need = f"at least {least}" if value < least else "a finite number"
                raise Refusal(f"{flag(name)} is {value}; it must be {need}")
        for name, most in self.at_most.items():
            if (getattr(self, name) or 0) > most:
                raise Refusal(f"{flag(name)} is {getattr(self, name)}; it must be at most {most}")
        for name in ("warmup", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refusal(f"{flag(name)} is {getattr(self, name)}; it is a share, from 0 to 1")
        self._check_schedule()
        if self.layer_decay == 0:
            raise Refusal("--layer-decay is 0; it must be above 0")
        if self.pull and self.source is None:
            raise Refusal(
                f"--pull {self.pull:g} draws weights back to those that a run begins with, and this one begins with "
                "none; give --from DIR, or leave it out"
            )
        if (self.dropout or 0) >= 1:
            raise Refusal(f"--dropout is {self.dropout}; it is a share, from 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Refusal(f"--betas are {self.betas[0]} {self.betas[1]}; each must be at least 0 and below 1")

    def curve(self) -> Callable[[Moment], float]:
        """The share of the peak learning rate at a moment. Raises Refusal for options that the schedule lacks."""
        known, of = defaults(self.schedule), f"--schedule {self.schedule}"
        return partial(SCHEDULES[self.schedule], **assigned("--schedule-options", self.schedule_options, known, of))

    def _check_schedule(self) -> None:
        given = f"--schedule {self.schedule} --schedule-options {' '.join(self.schedule_options)}".strip()
        curve = self.curve()
        for done in range(20):
            try:
                share = curve(Moment(done, done + 1, 20, 20 * self.warmup, self.min_lr_ratio))
            except (ValueError, ArithmeticError, TypeError) as error:
                raise Refusal(f"{given}: {error}") from error
            if isinstance(share, complex) or not 0 <= share <= 1 + 1e-9:
                raise Refusal(f"{given} makes the rate {share} times its peak; give other options")

    def course(self, steps: int) -> "Course":
        """How large each of so many updates is."""
        from fastlm.trainer.course import Course

        return Course(steps, self.batch, self.accumulate)

    def contexts(self, longest: int) -> list[int]:
        """Tokens of a row in each stage of the course."""
        return [longest]

    def at_its_largest(self) -> "Training":
        """The same with updates that are all as large as the last."""
        return self

    def updates_in(self, largest: int, longest: int) -> int:
        """How many updates take as long as so many of the largest, in which rows have `longest` tokens."""
        return largest

    def remembers(self, shape: "ModelConfig") -> bool:
        """Whether a model of this shape is trained on rows of which each goes on where one before ended."""
        return False

    def check_machine(self) -> None:
        """Raises Refusal for a device or a package that is not there."""
        import torch

        from fastlm.trainer.outputs import logs

        if self.log != "none":
            logs.check(self.log)

        if self.device == "cuda" and not torch.cuda.is_available():
            raise Refusal("--device cuda, but torch sees no GPU; `fastlm info` says more")

    def settled_paths(self) -> dict:
        """Fields that hold a path that only this folder knows, resolved."""
        named = (str(Path(name).resolve()) if plugins.is_file(name) else name for name in self.plugin)
        return {"plugin": tuple(named), "device": self.torch_device().type}

    def to_json(self) -> dict:
        """Values that JSON has, and the command they are flags of."""
        text = lambda value: str(value) if isinstance(value, Path) else value
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: list(map(text, x)) if isinstance(x, tuple) else text(x) for name, x in values.items()}
        return {"command": self.command} | values

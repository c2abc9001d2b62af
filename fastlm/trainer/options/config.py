"""Everything a command can be asked for: dataclasses from which the command line's flags are made."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from fastlm.trainer.data.corpus import check_there
from fastlm.trainer.data.tokenizer import EOS, LEAST, PAD, bare_vocabulary
from fastlm.trainer.options import plugins
from fastlm.trainer.options.choices import REGISTRIES, choices
from fastlm.trainer.words import Refusal, did_you_mean

if TYPE_CHECKING:  # torch takes seconds, for which a mistyped flag need not wait
    import numpy as np
    import torch

    from fastlm.models import ModelConfig
    from fastlm.objectives import Objective, Vocabulary

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # what torch calls them
SHARDS = ("none", "optimizer", "gradients", "parameters")  # what several processes divide
AT_LEAST = {
    "vocab": LEAST, "steps": 1, "context": 1, "dim": 1, "layers": 1, "heads": 1, "batch": 1,
    "accumulate": 1, "threads": 1, "evaluations": 0, "seed": 0, "memory": 0, "dropout": 0, "lr": 0, "weight_decay": 0,
    "clip": 0, "save_every": 0,
}  # fmt: skip
# ids are 32 bits wide; rows are tried before there is a text; OpenMP dies of far too many threads
AT_MOST = {"vocab": 2**32, "context": 2**24, "memory": 2**24, "seed": 2**63 - 1, "threads": 16 * (os.cpu_count() or 1)}
LR = {"adamw": 2.5e-3, "adam": 2.5e-3, "adafactor": 6e-2, "lamb": 3e-2, "sgd": 0.1}  # peak rates for a small model
OTHER_LR = 1e-3  # of a plugin's optimizer
DECAY = {"adam": 0.0, "sgd": 0.0}  # which add it to the gradient, where 0.1 drowns the rest
OTHER_DECAY = 0.1


def unset(kind: str, meaning: str) -> arg:
    """How --help shows a flag that is None unless given: what it takes, and what None means."""
    return arg(metavar=kind, help_behavior_hint=f"(default: {meaning})")


@dataclass(frozen=True)
class Config:
    """Train a language model from nothing. Without a flag: two minutes on Python's own source code, on the machine at
    hand.
    """

    preset: Literal[choices("preset")] = "llama"
    """The model's kind; the flags below change its shape."""
    position: Annotated[Literal[("preset", *choices("position"))], unset(None, "the preset's")] = "preset"
    """Positional scheme."""
    optimizer: Literal[choices("optimizer")] = "adamw"
    """What turns gradients into updates."""
    objective: Annotated[Literal[("preset", *choices("objective"))], unset(None, "the preset's")] = "preset"
    """What is learned; the README's table says what each objective is."""
    plugin: Annotated[tuple[str, ...], unset("MODULE...", "none")] = ()
    """Modules or .py files to import first; what they register can be chosen here."""
    data: Annotated[tuple[Path, ...], unset("PATH...", "the standard library's sources")] = ()
    """Files and folders of .txt, .md, .py, .jsonl, .json, .csv, .tsv, each also as .gz."""
    text_key: str = "text"
    """The field that holds the text in a row of a .jsonl, .json, .csv or .tsv."""
    minutes: float = 2.0
    """Wall time to train for. The first seconds are measured and fix the number of steps."""
    steps: Annotated[int | None, unset("INT", "what fits in the minutes")] = None
    """Train for exactly this many updates instead."""
    seed: int = 0
    """Of weights, batches, dropout and samples; the same one gives the same run."""
    out: Annotated[Path | None, unset("PATH", "runs/<date-time>")] = None
    """Folder to write."""

    vocab: int = 2048
    """Size of the byte-level BPE vocabulary."""
    context: Annotated[int | None, unset("INT", "the preset's; 128 for llama")] = None
    """Tokens in a row; small models that see both sides of a token, such as bert, have 64."""
    dim: Annotated[int | None, unset("INT", "the preset's; 128 for llama")] = None
    """Width of the model; a multiple of --heads."""
    layers: Annotated[int | None, unset("INT", "the preset's; 4 for llama")] = None
    """Blocks of attention and feed-forward layer."""
    heads: Annotated[int | None, unset("INT", "the preset's; 4 for llama")] = None
    """Attention heads, each --dim / --heads wide."""
    memory: Annotated[int | None, unset("INT", "the preset's; --context for transformer-xl")] = None
    """Tokens of the rows before that attention sees too, where the objective is causal; 0 for none."""
    dropout: Annotated[float | None, unset("FLOAT", "the preset's; 0.0 for llama")] = None
    """Share of activations left out in training; for small models, such as bert, the preset's is 0."""

    batch: int = 8
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an update."""
    lr: Annotated[float | None, unset("FLOAT", ", ".join(f"{rate:g} for {name}" for name, rate in LR.items()))] = None
    """Peak learning rate; small models whose norms come last, such as bert, get a share of the default."""
    schedule: Literal[choices("schedule")] = "cosine"
    """How the rate falls after its peak."""
    warmup: float = 0.05
    """Share of the steps on which the rate climbs."""
    min_lr_ratio: float = 0.1
    """Share of the peak rate at which the schedule ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How much of the last means of gradients and of their squares Adam's kind keeps at each step."""
    weight_decay: Annotated[float | None, unset("FLOAT", f"{OTHER_DECAY:g}; 0 for {' and '.join(DECAY)}")] = None
    """How strongly weights are drawn to zero."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
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
    save_every: float = 30.0
    """Seconds between checkpoints. Results do not depend on it."""

    def model(self, vocab_size: int) -> "ModelConfig":
        """The preset with this run's changes. Raises ValueError for shapes that do not fit together."""
        from fastlm.models.presets import PRESETS, preset
        from fastlm.objectives import small

        names = ("position", "context", "dim", "layers", "heads", "memory", "dropout")
        changes = {name: value for name in names if (value := getattr(self, name)) not in (None, "preset")}
        objective, row = self.objective_class(), PRESETS[self.preset]
        own = small(self.preset)
        changes = changes if own is None else own.shape(row) | changes
        if row.memory == row.context:  # as long as a row, however long that is
            changes = {"memory": changes.get("context", row.memory)} | changes
        if changes.get("position", row.position) != row.position:
            changes["position_options"] = {}  # the preset's are of its own scheme
        elif row.skip_padding:  # positions begin after padding's id, as RoBERTa's
            changes["position_options"] = row.position_options | {"offset": PAD + 1}
        return preset(self.preset, vocab_size=vocab_size + objective.extra_ids, **objective.shape | changes)

    def objective_class(self) -> "type[Objective]":
        """The objective, which is the preset's unless it is given."""
        from fastlm.objectives import OBJECTIVES, recipe

        return OBJECTIVES[recipe(self.preset)[0] if self.objective == "preset" else self.objective]

    def objective_over(
        self, ids: "np.ndarray", context: int, known: "Vocabulary", streams: int | None = None
    ) -> "Objective":
        """The objective over a stream of ids, with the preset's options where it is the preset's; in so many streams if
        its rows go on where others ended. Raises ValueError.
        """
        from fastlm.objectives import recipe

        made, (name, options) = self.objective_class(), recipe(self.preset)
        options = options if made.name == name else {}
        return made(ids, context, known, **options | ({} if streams is None else {"streams": streams}))

    def sketch(self, vocab_size: int) -> "ModelConfig":
        """The same, without the memory that its positional scheme's parameters would take."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        try:
            with FakeTensorMode():
                return self.model(vocab_size)
        except RuntimeError:  # a plugin's scheme looks at its numbers
            return self.model(vocab_size)

    def torch_device(self) -> "torch.device":
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def settled(self) -> "Config":
        """The same with what the machine, the folder or another flag decides written out, so that it can be
        repeated.
        """
        from fastlm.objectives import small

        paths = {"data": tuple(p.resolve() for p in self.data)}
        paths |= {"plugin": tuple(str(Path(name).resolve()) if plugins.is_file(name) else name for name in self.plugin)}
        own = small(self.preset)
        lr = LR.get(self.optimizer, OTHER_LR) * (1.0 if own is None else own.lr)
        optimizer = {"lr": lr, "weight_decay": DECAY.get(self.optimizer, OTHER_DECAY)}
        optimizer = {name: value for name, value in optimizer.items() if getattr(self, name) is None}
        return replace(self, device=self.torch_device().type, **paths, **optimizer)

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values no run can have."""
        self.check_values()
        self._check_machine()
        self._check_shape()

    def check_values(self) -> None:
        """What of `check` can be said before torch is there."""
        for name in REGISTRIES:
            of_preset = ("preset",) if name in ("position", "objective") else ()
            value, known = getattr(self, name), (*choices(name), *of_preset)
            if value not in known:
                raise Refusal(
                    f"--{name} {value} is unknown{did_you_mean(value, known)}; choose from {', '.join(known)}"
                )
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):  # NaN is refused too
                need = f"at least {least}" if value < least else "a finite number"
                raise Refusal(f"{flag(name)} is {value}; it must be {need}")
        for name, most in AT_MOST.items():
            if (getattr(self, name) or 0) > most:
                raise Refusal(f"{flag(name)} is {getattr(self, name)}; it must be at most {most}")
        if not 0 < self.minutes < float("inf"):
            raise Refusal(f"--minutes is {self.minutes:g}; it must be above 0")
        for name in ("warmup", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refusal(f"{flag(name)} is {getattr(self, name)}; it is a share, from 0 to 1")
        if (self.dropout or 0) >= 1:
            raise Refusal(f"--dropout is {self.dropout}; it is a share, from 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Refusal(f"--betas are {self.betas[0]} {self.betas[1]}; each must be at least 0 and below 1")
        check_there(self.data)

    def _check_machine(self) -> None:
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise Refusal("--device cuda, but torch sees no GPU; `fastlm info` says more")

    def _check_shape(self) -> None:
        from fastlm.models.presets import PRESETS
        from fastlm.objectives import recipe

        kind, objective = PRESETS[self.preset].kind, self.objective_class()
        if objective.kind != kind:
            raise Refusal(
                f"--objective {objective.name} trains a model of kind {objective.kind}, and --preset {self.preset} is "
                f"of kind {kind}; give --objective {recipe(self.preset)[0]}, or another --preset"
            )
        dim, heads = self.dim or PRESETS[self.preset].dim, self.heads or PRESETS[self.preset].heads
        if dim % heads:
            near = max(1, round(dim / heads)) * heads
            raise Refusal(f"--dim {dim} is no multiple of --heads {heads}; give --dim {near}, or other --heads")
        try:
            shape = self.sketch(self.vocab)
        except ValueError as error:
            heads = f"--dim {dim} / --heads {heads} makes heads {dim // heads} wide"
            raise Refusal(f"{error}; {heads}: change one of them, or --position") from error
        self._check_memory(shape)
        try:
            self.objective_on_rows(shape.context, self.vocab)
        except ValueError as error:
            raise Refusal(f"--context {shape.context}, --objective {objective.name}: {error}") from error

    def _check_memory(self, shape: "ModelConfig") -> None:
        from fastlm.positions import SCHEMES

        continues, name = self.objective_class().continues, self.objective_class().name
        if self.memory and not continues:
            raise Refusal(
                f"--memory is {self.memory}, and no row of --objective {name} goes on where another ended; leave it out"
            )
        if shape.memory and continues and SCHEMES[shape.position].embeds():
            raise Refusal(
                f"--memory {shape.memory} is of rows before, of which --position {shape.position} says nothing; give "
                "--memory 0, or a scheme that acts in attention, such as transformer-xl"
            )

    def remembers(self, shape: "ModelConfig") -> bool:
        """Whether a model of this shape is trained on rows of which each goes on where one before ended."""
        return shape.memory > 0 and self.objective_class().continues

    def objective_on_rows(self, context: int, vocab_size: int) -> "Objective":
        """The objective over a text of two documents, a row each, which says what it cannot be made for."""
        import numpy as np

        ids = np.zeros(2 * context + 2, np.uint16)
        ids[context] = EOS
        return self.objective_over(ids, context, bare_vocabulary(vocab_size))

    def to_json(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"data": [str(p) for p in self.data], "out": None if self.out is None else str(self.out)}

    @classmethod
    def from_json(cls, values: dict) -> "Config":

        paths = {"data": tuple(map(Path, values["data"])), "out": values["out"] and Path(values["out"])}
        return cls(**values | paths | {name: tuple(values[name]) for name in ("betas", "plugin")})


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")

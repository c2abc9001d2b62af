"""Everything `fastlm pretrain` can be asked for: a dataclass from which its flags are made."""

import inspect
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import arg

from fastlm.trainer.data.corpus import check_there
from fastlm.trainer.data.shards.folders import check_asked
from fastlm.trainer.data.tokenizer import EOS, LEAST, PAD, bare_vocabulary
from fastlm.trainer.options.assigned import assigned
from fastlm.trainer.options.choices import choices
from fastlm.trainer.options.folders import check_folder
from fastlm.trainer.options.training import BATCH, DECAY, LR, OTHER_DECAY, OTHER_LR, TUPLES, Training, unset
from fastlm.trainer.words import Refusal, flag

if TYPE_CHECKING:  # torch takes seconds, for which a mistyped flag need not wait
    import numpy as np

    from fastlm.models import ModelConfig
    from fastlm.objectives import Objective, Vocabulary
    from fastlm.trainer.course import Course


@dataclass(frozen=True)
class Pretraining:
    """The part of a configuration that says what is learned, and by which model."""

    preset: Literal[choices("preset")] = "llama"
    """The model's kind; the flags below change its shape."""
    position: Annotated[Literal[("preset", *choices("position"))], unset(None, "the preset's")] = "preset"
    """Positional scheme."""
    objective: Annotated[Literal[("preset", *choices("objective"))], unset(None, "the preset's")] = "preset"
    """What is learned; the README's table says what each objective is."""
    from_: Annotated[Path | None, arg(name="from", metavar="DIR", help_behavior_hint="(default: nothing)")] = None
    """A run's folder, or one that transformers can open, to begin with its weights; its shape and its tokenizer are the
    model's then, and what it learned is what it learns."""
    objective_options: Annotated[tuple[str, ...], unset("NAME=VALUE...", "the preset's")] = ()
    """Options of the objective: of mlm rate=0.4 of tokens hidden, first_rate=0.5 at the beginning, rounds=1
    for static masking, …"""
    lengths: Annotated[tuple[str, ...], unset("TOKENS:SHARE...", "--context throughout")] = ()
    """Shorter rows up to such shares of the updates: 128:0.9 of BERT's, or several, 32:0.1 64:0.3."""
    batch_ramp: float = 0.0
    """Share of the updates over which one grows from one micro-batch to --accumulate, linearly in the tokens seen."""
    data: Annotated[tuple[Path, ...], unset("PATH...", "the standard library's sources")] = ()
    """Files and folders of .txt, .md, .py, .jsonl, .json, .csv, .tsv, each also as .gz; or a folder of `fastlm data
    pack`."""
    weights: Annotated[tuple[str, ...], unset("NAME=SHARE...", "as much as there is of each")] = ()
    """How much of the samples is of each source in a folder of `fastlm data pack`: books=0.7 web=0.3."""
    validation: Annotated[tuple[Path, ...], unset("PATH...", "a part of --data")] = ()
    """Files and folders that are held out, all of them, instead of a part of the text."""
    text_key: str = "text"
    """The field that holds the text in a row of a .jsonl, .json, .csv or .tsv."""
    minutes: float = 2.0
    """Wall time to train for. The first seconds are measured and fix the number of steps."""
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
    kv_heads: Annotated[int | None, unset("INT", "the preset's; --heads for most")] = None
    """Heads of keys and values, each for as many of --heads (grouped-query attention)."""
    hidden: Annotated[int | None, unset("INT", "the preset's; 4 times --dim for most")] = None
    """Width of the feed-forward layers."""
    memory: Annotated[int | None, unset("INT", "the preset's; --context for transformer-xl, 0 for xlnet")] = None
    """Tokens of the rows before that attention sees too, where the objective is causal or permutation; 0 for none."""


@dataclass(frozen=True)
class Config(Training, Pretraining):
    """Train a language model, from nothing unless --from says otherwise. Without a flag: two minutes on Python's own
    source code, on the machine at hand. --config FILE takes flags from a .toml or .json file, from a run.json, or from
    a recipe by its name, such as gpt3.
    """

    batch: Annotated[int | None, unset("INT", f"{BATCH}; more for bert and albert")] = None
    """Rows in a micro-batch."""

    command: ClassVar[str] = "pretrain"
    at_least: ClassVar[dict[str, float]] = Training.at_least | {
        "vocab": LEAST, "context": 1, "dim": 1, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 1, "memory": 0,
    }  # fmt: skip
    # ids are 32 bits wide; rows are tried before there is a text
    at_most: ClassVar[dict[str, float]] = Training.at_most | {"vocab": 2**32, "context": 2**24, "memory": 2**24}

    @property
    def source(self) -> Path | None:
        """The folder whose weights a run begins with."""
        return self.from_

    @property
    def named(self) -> str:
        """What the model is called."""
        return self.preset

    def model(self, vocab_size: int) -> "ModelConfig":
        """The preset with this run's changes, or the shape that --from found, which has all ids that are needed. Raises
        ValueError for shapes that do not fit together.
        """
        from fastlm.models import ModelConfig
        from fastlm.models.presets import PRESETS, preset
        from fastlm.objectives import small

        if self.shape is not None:
            found = ModelConfig(**self.shape)
            asked = {name: getattr(self, name) for name in ("memory", "dropout") if getattr(self, name) is not None}
            head = {"head": "lm"} if found.head == "none" else {}
            return replace(found, **head | self.objective_class().shape | asked)

        names = ("position", "context", "dim", "layers", "heads", "kv_heads", "hidden", "memory", "dropout")
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
        options = (options if made.name == name else {}) | self._asked_of(made)
        return made(ids, context, known, **options | ({} if streams is None else {"streams": streams}))

    def _asked_of(self, made: "type[Objective]") -> dict[str, object]:
        """The options in --objective-options."""
        from fastlm.objectives.noise.masking import Hides, Masking

        parameters = inspect.signature(made).parameters.values()
        known = {x.name: x.default for x in parameters if x.default is not x.empty and x.name != "streams"}
        known |= Masking._field_defaults if issubclass(made, Hides) else {}
        return assigned("--objective-options", self.objective_options, known, f"--objective {made.name}")

    def course(self, steps: int) -> "Course":
        from fastlm.trainer.course import Course

        return Course(steps, self.batch, self.accumulate, self.batch_ramp, [share for _, share in self._stages()])

    def contexts(self, longest: int) -> list[int]:
        return [*(tokens for tokens, _ in self._stages()), longest]

    def at_its_largest(self) -> "Config":
        return replace(self, batch_ramp=0.0, lengths=())

    def updates_in(self, largest: int, longest: int) -> int:
        if largest < 1:
            return largest
        course = self.course(largest)
        rows = zip(course.rows_of_stages(largest), self.contexts(longest), strict=True)
        tokens = sum(n * context for n, context in rows)
        return largest * largest * self.batch * self.accumulate * longest // tokens

    def _stages(self) -> list[tuple[int, float]]:
        """(tokens of a row, the share of the updates at which that ends) of --lengths. Raises Refusal."""
        stages = []
        for word in self.lengths:
            tokens, _, share = word.partition(":")
            try:
                stages.append((int(tokens), float(share)))
            except ValueError:
                raise Refusal(f"--lengths {word} is no TOKENS:SHARE, such as 128:0.9") from None
        shares = [0.0, *(share for _, share in stages), 1.0]
        if not all(before < after for before, after in pairwise(shares)):
            raise Refusal(f"--lengths {' '.join(self.lengths)}: shares of the updates rise, between 0 and 1")
        return stages

    def settled(self) -> "Config":
        """The same with what the machine, the folder or another flag decides written out, so that it can be
        repeated.
        """
        from fastlm.objectives import small

        resolved = lambda paths: tuple(path.resolve() for path in paths)
        paths = {"data": resolved(self.data), "validation": resolved(self.validation)}
        paths |= {"from_": self.from_ and self.from_.resolve()}
        own = small(self.preset)
        lr = LR.get(self.optimizer, OTHER_LR) * (1.0 if own is None else own.lr)
        batch = BATCH if own is None or own.batch is None else own.batch
        unsaid = {"lr": lr, "weight_decay": DECAY.get(self.optimizer, OTHER_DECAY), "batch": batch}
        unsaid = {name: value for name, value in unsaid.items() if getattr(self, name) is None}
        return replace(self, **self.settled_paths(), **paths, **unsaid)

    def check(self) -> None:
        """Raises Refusal, naming the flag and the cure, for values no run can have."""
        self.check_values()
        self.check_machine()
        self._check_shape()

    def check_values(self) -> None:
        super().check_values()
        if not 0 < self.minutes < float("inf"):
            raise Refusal(f"--minutes is {self.minutes:g}; it must be above 0")
        if not 0 <= self.batch_ramp <= 1:
            raise Refusal(f"--batch-ramp is {self.batch_ramp}; it is a share, from 0 to 1")
        if self.batch_ramp and self.accumulate == 1:
            raise Refusal(f"--batch-ramp {self.batch_ramp:g} leads to --accumulate 1, where it begins; give more of it")
        self._stages()
        check_there(self.data)
        check_there(self.validation, "--validation")
        check_asked(self.data, self.validation, self.weights)
        if self.from_ is not None and self.shape is None:  # a run that has begun needs it no more
            check_folder(self.from_, flag("from_"))

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
        if dim % heads and self.shape is None:
            near = max(1, round(dim / heads)) * heads
            raise Refusal(f"--dim {dim} is no multiple of --heads {heads}; give --dim {near}, or other --heads")
        try:
            shape = self.sketch(self.vocab)
        except ValueError as error:
            heads = f"--dim {dim} / --heads {heads} makes heads {dim // heads} wide"
            raise Refusal(f"{error}; {heads}: change one of them, or --position") from error
        self._check_memory(shape)
        for context in reversed(self.contexts(shape.context)):
            if not 0 < context <= shape.context:
                raise Refusal(f"--lengths {context} is no row of 1 to --context {shape.context} tokens")
            try:
                self.objective_on_rows(context, self.vocab)
            except Refusal:
                raise
            except ValueError as error:
                named = "--context" if context == shape.context else "--lengths"
                raise Refusal(f"{named} {context}, --objective {objective.name}: {error}") from error

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

        for name, given in (("--lengths", self.lengths), ("--batch-ramp", self.batch_ramp)):
            if given and self.remembers(shape):
                raise Refusal(f"{name} changes which rows go on where others ended; give --memory 0, or leave it out")

    def remembers(self, shape: "ModelConfig") -> bool:
        return shape.memory > 0 and self.objective_class().continues

    def objective_on_rows(self, context: int, vocab_size: int) -> "Objective":
        """The objective over a text of two documents, a row each, which says what it cannot be made for."""
        import numpy as np

        ids = np.zeros(2 * context + 2, np.uint16)
        ids[context] = EOS
        return self.objective_over(ids, context, bare_vocabulary(vocab_size))

    @classmethod
    def from_json(cls, values: dict) -> "Config":
        """The configuration that `to_json` was of."""
        optional = {name: values[name] and Path(values[name]) for name in ("out", "from_")}
        values = {name: value for name, value in values.items() if name != "command"}
        paths = {name: tuple(map(Path, values.get(name, ()))) for name in ("data", "validation")} | optional
        return cls(**values | paths | {name: tuple(values[name]) for name in TUPLES if name in values})

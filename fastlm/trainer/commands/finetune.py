"""`fastlm finetune`: labelled rows that are read, and a run that learns them from the weights of another."""

from dataclasses import asdict, replace
from math import ceil
from pathlib import Path

from fastlm.models import ModelConfig
from fastlm.trainer import memory
from fastlm.trainer.commands.ready import begin, heard
from fastlm.trainer.commands.start import open_start
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.tokenizer import load_tokenizer, vocabulary
from fastlm.trainer.material import check_unchanged
from fastlm.trainer.options import plugins
from fastlm.trainer.options.finetune import FineTune
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.plan import new_folder
from fastlm.trainer.tasks import library, rows
from fastlm.trainer.tasks.examples import Examples, Facts, encoded, encoding_of, fingerprint, sides_of
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.tasks.task import Example
from fastlm.trainer.words import Refusal, several

KINDS = {"text-to-text": ("decoder", "encoder-decoder")}  # of models that can learn it, where not all can


def finetune(config: FineTune, argv: list[str]) -> int:
    """Fine-tune a model; return the exit status. Raises Refusal before any work is lost, Failure if training fails."""
    plugins.load(config.plugin)
    with heard(config, "nothing was begun") as here:
        config.check()
        start = open_start(config.folder, config.plugin, lambda line: here.console.say("note", line))
        config = replace(config, shape=asdict(start.opened.model.config))
        with new_folder(config.out, here.ranks) as folder:
            return begin(folder, config.settled(), argv, here, read, start).train()


def read(config: FineTune, console: Console, tokenizer_file: Path, began: str | None) -> tuple[FineTune, Examples]:
    """Read the rows of both sides, and say what they are; arguments as in `ready.Read`."""
    if config.plugin:
        console.say("plugin", *config.plugin)
    skipped = Skipped()
    name, kind, train, held_out, split = _rows(config, skipped)
    labels = rows.labels_of(train) if kind == "classification" else ()
    config = replace(config, kind=kind, labels=labels)
    _check(config, name, train, held_out)
    mark = fingerprint(train, held_out)
    check_unchanged(f"{'--task ' * bool(config.task)}{name}", mark, began)
    tokenizer = load_tokenizer(tokenizer_file)
    known = vocabulary(tokenizer)
    memory.check_fits(config, known.size)
    sides = [encoded(side, config, known, encoding_of(tokenizer), skipped.add) for side in (train, held_out)]
    if not all(sides):
        lines = "; ".join(skipped.lines())
        raise Refusal(f"{name} leaves no row {'held out' if sides[0] else 'to train on'} ({lines}); give other rows")
    _check_budget(config, name, sides[0])
    material = Examples(
        name, config.task_class(), config.head(), *sides, mark, split, skipped, tokenizer_file, Facts(known.size)
    )
    _say(material, console)
    steps = config.steps or ceil(config.epochs * len(material.train) / (config.batch * config.accumulate))
    return replace(config, steps=steps), material


def _rows(config: FineTune, skipped: Skipped) -> tuple[str, str, list[Row], list[Row], str]:
    """What the rows are called, their kind, those of both sides, and how they were told apart."""
    if config.task is None:
        if config.kind not in ("columns", "classification"):
            raise Refusal(f"--kind {config.kind} needs --task; without it, the kind is classification")
        name, found = library.rows()
        return name, "classification", *sides_of(found, config.seed), library.SPLIT
    name = config.task.name
    kind = None if config.kind == "columns" else config.kind
    kind, found = rows.read(config.task, "--task", kind, skipped.add)
    if config.held_out is not None:
        _, held_out = rows.read(config.held_out, "--held-out", kind, skipped.add)
        return name, kind, found, held_out, f"held out: {config.held_out.name}"
    split = "held out: a tenth of the rows, drawn by --seed; those of one text are on one side"
    return name, kind, *sides_of(found, config.seed), split


def _check(config: FineTune, name: str, train: list[Row], held_out: list[Row]) -> None:
    """Raises Refusal for rows from which nothing can be learned, and for a model that cannot learn them."""
    if not train:
        raise Refusal(f"{name} has {several(len(held_out), 'row')}, and one of them is held out; give more rows")
    if config.kind == "classification" and len(config.labels) < 2:
        raise Refusal(f"{name} has one label, {config.labels[0]!r}, to train on; give rows of two or more")
    kind = ModelConfig(**config.shape).kind
    if kind not in KINDS.get(config.kind, (kind,)):
        raise Refusal(
            f"--kind {config.kind} writes text, and {config.folder} holds an {kind}, which writes none; give a run of "
            "another --preset, such as t5 or llama"
        )


def _check_budget(config: FineTune, name: str, train: list[Example]) -> None:
    longest = max(len(example.row.ids) for example in train)
    if config.max_tokens is not None and config.max_tokens < longest:
        raise Refusal(
            f"--max-tokens {config.max_tokens} is less than the {longest} ids of the longest row of {name}; "
            f"give at least {longest}"
        )


def _say(material: Examples, console: Console) -> None:
    sides = f"{several(len(material.train), 'row')} to train on, {len(material.held_out):,} held out"
    labels = f" of {len(material.head.labels)} labels" if material.head.labels else ""
    mark = f"SHA-256 {material.fingerprint[:12]}"
    console.say("task", material.name, material.task.name + labels, sides, mark, material.split)
    for line in material.skipped.lines():
        console.say("skipped", line)
    if material.cut:
        lost = f", {material.lost:,} of them with the answer" if material.lost else ""
        console.say("note", f"{several(material.cut, 'row')} are longer than the model reads, and were cut{lost}")

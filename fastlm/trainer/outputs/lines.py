"""What a run says of its text, its model, its progress and its end: lines of a label and its parts, for a Console."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastlm.models import Transformer
from fastlm.models.heads import Headed
from fastlm.objectives import Objective
from fastlm.optim import memory_table
from fastlm.trainer.budget import Budget, Looks
from fastlm.trainer.data.corpus import Corpus
from fastlm.trainer.data.tokens import Tokens
from fastlm.trainer.distributed.shards import bytes_each, inner
from fastlm.trainer.material import Material
from fastlm.trainer.options.config import Config
from fastlm.trainer.outputs import artefacts
from fastlm.trainer.outputs.metrics import resident_bytes
from fastlm.trainer.patience import Patience
from fastlm.trainer.plan import Plan
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import clock, command, count, several, size

REPEATED = 0.3  # share of repeated lines from which we warn; the standard library has 0.14
SLOW = 1.5  # times fp32's time from which we warn
NAMED = 6  # parts of a model in one line

Line = tuple[str, ...]


def of_machine(config: Config, environment: dict[str, str], dtype_cost: float) -> Iterator[Line]:
    """dtype_cost: how many times fp32's time a matrix product takes in --dtype."""
    where = environment["torch"], f"Python {environment['python']}", environment["device"]
    yield "torch", *where, config.dtype, f"seed {config.seed}"
    if dtype_cost > SLOW:
        slow = f"matrix products in {config.dtype} take {dtype_cost:.1f} times as long as in fp32 on this machine"
        yield "warning", f"{slow}; --dtype fp32 is faster here"


def of_text(corpus: Corpus, split: bool = True) -> Iterator[Line]:
    """split: whether a part of it is held out."""
    files = several(len(corpus.sources), "file")
    said = (corpus.split,) if split else ()
    yield "data", corpus.name, files, size(corpus.bytes), f"SHA-256 {corpus.fingerprint[:12]}", *said
    for line in corpus.skipped.lines():
        yield "skipped", line
    if corpus.repeated > REPEATED:
        share = f"{corpus.repeated:.0%} of the lines repeat an earlier line"
        yield "warning", f"{share}, and a model learns repeats by heart; remove duplicates"


def of_tokens(config: Config, tokens: Tokens) -> Iterator[Line]:
    vocab = tokens.facts.vocab_size
    short = f" of the {config.vocab:,} asked for, the text has no more" if vocab < config.vocab else ""
    how = f"built in {tokens.built:.1f} s" if tokens.built else "cached"
    held_out = f"{count(len(tokens.held_out))} held out ({tokens.held_out_share:.1%} of the text)"
    sides = f"{count(len(tokens.train))} to train on, {held_out}"
    yield "tokens", f"byte-level BPE {vocab:,}{short} ({how})", f"{tokens.bytes_per_token:.2f} bytes each", sides


def of_model(config: Config, tokens: Tokens) -> Iterator[Line]:
    """What the model is."""
    shape = config.model(tokens.facts.vocab_size)
    objective = config.objective_on_rows(shape.context, tokens.facts.vocab_size)
    with torch.device("meta"):
        parameters = count(sum(p.numel() for p in objective.model(shape).parameters()))
    size_of = f"{several(shape.layers, 'layer')} of {shape.dim}", several(shape.heads, "head")
    yield (
        "model",
        config.named,
        objective.name,
        *size_of,
        f"context {shape.context}",
        *([f"memory {shape.memory}"] if config.remembers(shape) else []),
        shape.position,
        f"{parameters} parameters",
    )


def of_start(anew: list[str], pull: float) -> Iterator[str]:
    """Of a model that begins with another's weights: the parts whose tensors those did not have, and how strongly the
    others are drawn back.
    """
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in anew))
    if parts:
        more = f" and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
        yield f"{', '.join(parts[:NAMED])}{more} drawn anew"
    if pull:
        yield f"drawn back to them by {pull:g} times the rate"


def of_plan(plan: Plan, budget: Budget, trainer: Trainer, material: Material) -> Iterator[Line]:
    if not budget.fits:
        minutes = plan.config.minutes
        short = f"--minutes {minutes:g} is too short for one step on this machine; one is made all the same"
        yield "warning", f"{short}. Give more minutes, or a smaller --dim, --layers, --context or --batch"
    yield "threads", str(plan.threads), *(f"{count(speed)} tok/s with {n}" for n, speed in budget.speeds.items())
    yield "kernels", *(f"{op} {backend}" for op, backend in sorted(budget.backends.items()))
    yield "memory", str(memory_table(trainer.model, chosen=inner(trainer.optimizer))).replace("\n", "\n" + 9 * " ")
    if trainer.ranks.world > 1:
        yield "sharding", *_of_sharding(trainer)
    seen, rows = trainer.tokens_before(plan.steps), trainer.course.rows_of_stages(plan.steps)
    epochs = sum(material.epochs(n, stage.context) for n, stage in zip(rows, trainer.stages, strict=True))
    length = "as asked"
    if plan.config.steps is None:
        length = f"what fits in {clock(60 * plan.config.minutes)}" if budget.fits else "at least one"
    if (looks := plan.looks) != Looks.all_of(plan.config, trainer.held_out):
        fewer = (
            f"{several(looks.times, 'evaluation')} of {several(looks.windows, 'window')}, the last of {looks.last:,}"
        )
        yield "note", f"{fewer}, leave time for the steps; with more --minutes there are more"
    yield "steps", f"{plan.steps:,} ({length})", f"{count(seen)} tokens, {epochs:.2g} epochs"


def _of_sharding(trainer: Trainer) -> Iterator[str]:
    """What each process keeps for every way to divide the model, with the optimizer that it has, or else AdamW."""
    table = memory_table(trainer.model)
    row = next((row for row in table if row.optimizer == trainer.config.optimizer), None) or table[0]
    yield f"{trainer.ranks.world} processes, {row.optimizer}"
    each = bytes_each(row.parameters, row.gradients, row.masters + row.states, trainer.ranks.world)
    for name, kept in each.items():
        yield f"{name} {size(kept)}{' ← chosen' * (name == trainer.config.shard)}"


def of_evaluation(trainer: Trainer, windows: int, last: dict) -> Line:
    """windows: how many were looked at. last: the newest of each of the metrics, as everywhere below."""
    there = several(trainer.held_out.windows, "window")
    part = f"all {there}" if windows == trainer.held_out.windows else f"{windows:,} of {there}"
    return "held out", *_losses(trainer.held_out, last), f"step {trainer.step:,}", clock(last["seconds"]), part


def _losses(objective: Objective, last: dict) -> list[str]:
    """The loss; the term that is compared where it is another; bits per byte and shares where there are any."""
    terms = dict.fromkeys(("loss", objective.compared))
    parts = [f"{name} {last[f'held_out_{name}']:.3f} {objective.unit}".removeprefix("loss ") for name in terms]
    bits = last.get("held_out_bits_per_byte")  # None where the loss is no code length
    return [*parts, *([] if bits is None else [f"{bits:.3f} bits/byte"]), *shares(objective, last)]


def shares(objective: Objective, last: dict) -> list[str]:
    """What of held-out text was counted besides the loss."""
    return [f"{name.replace('_', ' ')} {objective.worded(name, last[f'held_out_{name}'])}" for name in objective.shares]


def of_progress(
    step: int,
    steps: int,
    left: float,
    speed: float,
    last: dict,
    shares: Sequence[str] = (),
    memory: int = 0,
    clipped: float | None = None,
) -> list[str]:
    """How far a run is, what matters most first. left: seconds; speed: tokens a second; shares: in words;
    memory: tokens of the rows before that the last update's attention saw; clipped: share of the updates.
    """
    parts = [f"{step / steps:4.0%}  {clock(left)} left", f"step {step:,}", _number("loss", last.get("loss"), ".3f")]
    parts += [f"held out {last['held_out_loss']:.3f}{' (step 0)' * (last['held_out_step'] == 0)}"]
    parts += [
        *shares,
        f"memory {memory}" * (memory > 0),
        _number("lr", last.get("lr"), ".2g"),
        f"{count(speed)} tok/s",
        _number("|g|", last.get("grad_norm"), ".2f"),
        _number("clipped", clipped, ".0%"),
    ]
    return [part for part in (*parts, f"rss {resident_bytes() / 1e9:.2f} GB") if part]


def _number(name: str, value: float | None, digits: str) -> str:
    return "" if value is None else f"{name} {value:{digits}}"


def of_patience(step: int, steps: int, patience: Patience) -> Iterator[Line]:
    if patience.over:
        none = f"no better held-out loss in {several(patience.since, 'evaluation')}"
        yield "ended", f"after step {step:,} of {steps:,}: {none}, which is what --patience allows"
    if patience.loss is not None:
        yield "best", f"held out {patience.loss:.3f} at step {patience.step:,}, in {artefacts.BEST}/"


def of_end(
    folder: Path, trainer: Trainer, exported: Transformer | Headed, material: Material, last: dict, seconds: float
) -> Iterator[Line]:
    seen = count(trainer.tokens_before(trainer.step))
    yield (
        "done",
        f"held out {', '.join(_losses(trainer.held_out, last))}",
        material.beside(),
        f"{seen} tokens",
        clock(seconds),
    )
    yield "wrote", f"{folder}/ {artefacts.FILES}"
    writes = getattr(exported, "decoder", None) is not None  # an encoder writes no text, nor does what has a head
    said = [command("predict", folder, "FILE")] * (trainer.config.command == "finetune")
    said += [command("sample", folder)] * writes
    yield "next", *said, f"weights open with {artefacts.opened_by(exported, folder)}"

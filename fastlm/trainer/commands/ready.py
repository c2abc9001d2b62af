"""A run made ready for its loop, whatever it learns: begun with what it learns from, a measurement and a plan, or read
back from its folder.

runs/<date-time>/  run.json  metrics.jsonl  sample.txt  state/  tokenizer.json      from the start
                   model.safetensors  config.json  loss.png  report.md              at the end; report.md is the last
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from fastlm import __version__
from fastlm.trainer import checkpoint, pull
from fastlm.trainer.budget import dtype_cost, measure
from fastlm.trainer.commands.start import Start
from fastlm.trainer.data.tokens import sha256
from fastlm.trainer.distributed.ranks import Ranks, joined
from fastlm.trainer.loop import Run
from fastlm.trainer.material import Material
from fastlm.trainer.options.training import Training
from fastlm.trainer.outputs import lines
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.logs import LOGS
from fastlm.trainer.outputs.metrics import Metrics
from fastlm.trainer.patience import Patience
from fastlm.trainer.plan import Plan, environment
from fastlm.trainer.signals import Stops
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Refusal, command

# takes the configuration, where to say what was found, the tokenizer.json to read with, or None for one to be made, and
# the fingerprint of what a run began with, or None for a new run; returns the configuration with what was found
Read = Callable[[Training, Console, Path | None, str | None], tuple[Training, Material]]


class Here(NamedTuple):
    """What a run in this process speaks through, is stopped by, and shares its work with."""

    console: Console
    stops: Stops
    ranks: Ranks


@contextmanager
def heard(config: Training, before: str) -> Iterator[Here]:
    """Inside the `with` block this process is one of the run's, hears signals, and shows warnings as lines.

    before: what to say of a run that had not begun to train when it was stopped.
    """
    stops = Stops(before)
    with joined(config.torch_device().type) as ranks, stops.heard():
        console = Console(stops.note, ranks.speaks)
        with console.warnings():
            yield Here(console, stops, ranks)


def begin(folder: Path, config: Training, argv: list[str], here: Here, read: Read, start: Start | None) -> Run:
    """Read what is learned, measure, write down the plan: a run before its first step.

    start: the weights to begin with, which the run's first checkpoint holds, so that it needs them from nowhere else;
    None for new ones.
    """
    pull.check(config)
    (console, stops, ranks), where = here, environment(config)
    console.say_all(lines.of_machine(config, where, dtype_cost(config)))
    with ranks.one_first():
        config, material = read(config, console, start and start.tokenizer_file, None)
    console.say_all(lines.of_model(config, material.sides))
    console.say("to beat", *material.to_beat())
    budget = measure(config, material.sides, ranks)
    tokenizer_file = material.sides.tokenizer_file
    plan = Plan(
        __version__,
        command(*argv),
        config,
        budget.steps,
        budget.looks,
        budget.threads,
        material.fingerprint,
        sha256(tokenizer_file),
        where,
    )
    plan = Plan.from_json(ranks.told(plan.to_json()))
    trainer = Trainer(config, material.sides, plan.steps, lambda: ranks.check(stops), ranks)
    console.say_all(lines.of_plan(plan, budget, trainer, material))
    console.say("writes", f"{folder}/")
    metrics = _metrics(folder, config, 0, ranks)
    run = Run(folder, plan, trainer, material, console, metrics, stops, ranks, Patience(config.patience), 0.0)
    if start is not None:
        with trainer.filling() as model:
            anew = start.give(trainer.train, model)
            if config.pull:
                starts = dict(pull.starts_of(model, anew))
                trainer.pull = pull.Pull(config.pull, trainer.model, starts.items())
                if ranks.speaks:
                    checkpoint.save_start(folder / "state", starts)
        console.say("begins", f"with the weights of {start.folder}", *lines.of_start(anew, config.pull))
        run.save()
    if ranks.speaks:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        stops.deferred = True  # with its run.json a run has begun
        plan.write(folder)
    return run


def go_on(folder: Path, plan: Plan, here: Here, read: Read) -> Run:
    """The run as its newest whole checkpoint left it."""
    console, stops, ranks = here
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.exists() or sha256(tokenizer_file) != plan.tokenizer:
        raise Refusal(f"{tokenizer_file} is not the one the run began with; restore it, or start a new run")
    for name, now in environment(plan.config).items():
        if now != plan.environment[name]:
            console.say(
                "warning",
                f"{name} is {now}, and was {plan.environment[name]}: the results may differ in their last bits",
            )
    torch.set_num_threads(plan.threads)
    with ranks.one_first():
        _, material = read(plan.config, console, tokenizer_file, plan.fingerprint)
    trainer, seconds = Trainer(plan.config, material.sides, plan.steps, lambda: ranks.check(stops), ranks), 0.0
    patience = Patience(plan.config.patience)
    last = checkpoint.newest(folder / "state", lambda fault: console.say("warning", fault))
    if last is not None:
        try:
            with trainer.filling() as model:
                progress = checkpoint.restore(last, model, trainer.optimizer)
            trainer.remember(checkpoint.remembered(last, trainer.device))
        except (RuntimeError, ValueError, KeyError) as error:
            raise Refusal(altered(folder, error)) from error
        trainer.step, seconds = progress["step"], progress["seconds"]
        trainer.scaler.load_state_dict(progress["scaler"])
        patience.load_state_dict(progress.get("patience", {}))
    elif plan.config.shape is not None:
        raise Refusal(
            f"{folder / 'state'} holds no whole checkpoint, and the weights that the run began with were there; "
            "restore it, or start a new run"
        )
    if plan.config.pull:
        trainer.pull = pull.Pull(plan.config.pull, trainer.model, checkpoint.start(folder / "state"))
    console.say("resume", f"{folder} from step {trainer.step} of {plan.steps}", f"threads {plan.threads}, as before")
    with ranks.one_first():
        metrics = _metrics(folder, plan.config, trainer.step, ranks)
    return Run(folder, plan, trainer, material, console, metrics, stops, ranks, patience, seconds)


def _metrics(folder: Path, config: Training, step: int, ranks: Ranks) -> Metrics:
    logs = ranks.speaks and config.log != "none"
    log = LOGS[config.log](folder, step, config.to_json()) if logs else None
    return Metrics(folder / "metrics.jsonl", step, ranks.speaks, log)


def altered(folder: Path, error: Exception) -> str:
    """What to say of a run.json that cannot be the run's."""
    why = " ".join(str(error).split())[:200]
    return f"{folder / 'run.json'} is not what the run began with ({why}); restore it, or start a new run"

"""A run made ready for its loop, whatever it learns: begun with what it learns from, a measurement and a plan, or read
back from its folder.

runs/<date-time>/  run.json  metrics.jsonl  sample.txt  state/  tokenizer.json      from the start
                   model.safetensors  config.json  loss.png  report.md              at the end; report.md is the last
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fastlm import __version__
from fastlm.trainer import checkpoint
from fastlm.trainer.budget import dtype_cost, measure
from fastlm.trainer.data.tokens import sha256
from fastlm.trainer.loop import Run
from fastlm.trainer.material import Material
from fastlm.trainer.options.training import Training
from fastlm.trainer.outputs import lines
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.metrics import Metrics
from fastlm.trainer.plan import Plan, environment
from fastlm.trainer.signals import Stops
from fastlm.trainer.start import Start
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Refusal, command

# takes the configuration, where to say what was found, the tokenizer.json to read with, or None for one to be made, and
# the fingerprint of what a run began with, or None for a new run; returns the configuration with what was found
Read = Callable[[Training, Console, Path | None, str | None], tuple[Training, Material]]


def begin(
    folder: Path, config: Training, argv: list[str], console: Console, stops: Stops, read: Read, start: Start | None
) -> Run:
    """Read what is learned, measure, write down the plan: a run before its first step.

    start: the weights to begin with, which the run's first checkpoint holds, so that it needs them from nowhere else;
    None for new ones.
    """
    where = environment(config)
    console.say_all(lines.of_machine(config, where, dtype_cost(config)))
    config, material = read(config, console, start and start.tokenizer_file, None)
    console.say_all(lines.of_model(config, material.sides))
    console.say("to beat", *material.to_beat())
    budget = measure(config, material.sides)
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
    trainer = Trainer(config, material.sides, plan.steps, stops.check)
    anew = [] if start is None else start.give(trainer.train, trainer.model)
    console.say_all(lines.of_plan(plan, budget, trainer, material))
    if start is not None:
        console.say("begins", f"with the weights of {start.folder}", *lines.of_new(anew))
    console.say("writes", f"{folder}/")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    if start is not None:
        progress = {"seconds": 0.0, "scaler": trainer.scaler.state_dict()}
        checkpoint.save(folder / "state", 0, trainer.model, trainer.optimizer, progress)
    metrics = Metrics(folder / "metrics.jsonl", 0)
    stops.deferred = True  # with its run.json a run has begun
    plan.write(folder)
    return Run(folder, plan, trainer, material, console, metrics, stops, 0.0)


def go_on(folder: Path, plan: Plan, console: Console, stops: Stops, read: Read) -> Run:
    """The run as its newest whole checkpoint left it."""
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.exists() or sha256(tokenizer_file) != plan.tokenizer:
        raise Refusal(f"{tokenizer_file} is not the one the run began with; restore it, or start a new run")
    for name, here in environment(plan.config).items():
        if here != plan.environment[name]:
            console.say(
                "warning",
                f"{name} is {here}, and was {plan.environment[name]}: the results may differ in their last bits",
            )
    torch.set_num_threads(plan.threads)
    _, material = read(plan.config, console, tokenizer_file, plan.fingerprint)
    trainer, seconds = Trainer(plan.config, material.sides, plan.steps, stops.check), 0.0
    last = checkpoint.newest(folder / "state", lambda fault: console.say("warning", fault))
    if last is not None:
        try:
            progress = checkpoint.restore(last, trainer.model, trainer.optimizer)
            trainer.remember(checkpoint.remembered(last, trainer.device))
        except (RuntimeError, ValueError, KeyError) as error:
            raise Refusal(altered(folder, error)) from error
        trainer.step, seconds = progress["step"], progress["seconds"]
        trainer.scaler.load_state_dict(progress["scaler"])
    elif plan.config.shape is not None:
        raise Refusal(
            f"{folder / 'state'} holds no whole checkpoint, and the weights that the run began with were there; "
            "restore it, or start a new run"
        )
    console.say("resume", f"{folder} from step {trainer.step} of {plan.steps}", f"threads {plan.threads}, as before")
    metrics = Metrics(folder / "metrics.jsonl", trainer.step)
    return Run(folder, plan, trainer, material, console, metrics, stops, seconds)


def altered(folder: Path, error: Exception) -> str:
    """What to say of a run.json that cannot be the run's."""
    why = " ".join(str(error).split())[:200]
    return f"{folder / 'run.json'} is not what the run began with ({why}); restore it, or start a new run"

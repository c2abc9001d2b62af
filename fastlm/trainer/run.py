"""A run made ready for its loop: begun with a text, a measurement and a plan, or read back from its folder.

runs/<date-time>/  run.json  metrics.jsonl  sample.txt  state/  tokenizer.json      from the start
                   model.safetensors  config.json  loss.png  report.md              at the end; report.md is the last
"""

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from fastlm import __version__
from fastlm.trainer import checkpoint, memory
from fastlm.trainer.budget import dtype_cost, measure
from fastlm.trainer.data.corpus import Corpus, find
from fastlm.trainer.data.tokens import Tokens, sha256, tokenize
from fastlm.trainer.distributed import shards
from fastlm.trainer.distributed.ranks import Ranks, joined
from fastlm.trainer.loop import Run
from fastlm.trainer.options import plugins
from fastlm.trainer.options.config import Config
from fastlm.trainer.outputs import lines
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.metrics import Metrics
from fastlm.trainer.plan import Plan, environment, locked, new_folder
from fastlm.trainer.signals import Stops
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Refusal, command, disk_words, say, several


def pretrain(config: Config, argv: list[str]) -> int:
    """Train a model from nothing; return the exit status. Raises Refusal before any work is lost, Failure if training
    fails.
    """
    plugins.load(config.plugin)
    config.check()
    shards.check(config)
    stops = Stops("nothing was begun")
    with joined(config.torch_device().type) as ranks, ExitStack() as stack:
        stack.enter_context(stops.heard())
        console = Console(stops.note, ranks.speaks)
        folder = Path(ranks.told(str(stack.enter_context(new_folder(config.out))) if ranks.speaks else ""))
        stack.enter_context(console.warnings())
        return _begin(folder, config.settled(), argv, console, stops, ranks).train()


def _begin(folder: Path, config: Config, argv: list[str], console: Console, stops: Stops, ranks: Ranks) -> Run:
    """Read the text, measure, write down the plan: a run before its first step."""
    where = environment(config)
    console.say_all(lines.of_machine(config, where, dtype_cost(config)))
    with ranks.one_first():
        corpus, tokens = _read(config, console)
    console.say_all(lines.of_model(config, tokens))
    budget = measure(config, tokens, ranks)
    plan = Plan(
        __version__,
        command(*argv),
        config,
        budget.steps,
        budget.looks,
        budget.threads,
        corpus.fingerprint,
        sha256(tokens.tokenizer_file),
        where,
    )
    plan = Plan.from_json(ranks.told(plan.to_json()))
    trainer = Trainer(config, tokens, plan.steps, lambda: ranks.check(stops), ranks)
    console.say_all(lines.of_plan(plan, budget, trainer, tokens))
    console.say("writes", f"{folder}/")
    metrics = Metrics(folder / "metrics.jsonl", 0, ranks.speaks)
    if ranks.speaks:
        shutil.copyfile(tokens.tokenizer_file, folder / "tokenizer.json")
        stops.deferred = True  # with its run.json a run has begun
        plan.write(folder)
    return Run(folder, plan, trainer, tokens, corpus, console, metrics, stops, ranks, 0.0)


def resume(folder: Path, imported: tuple[str, ...] = ()) -> int:
    """Go on with an interrupted run, exactly as if it had not been; return the exit status. Raises Refusal, Failure.

    imported: the plugins that were given for it, in this process.
    """
    go_on = f"go on with `{command('resume', folder)}`"
    stops = Stops(f"nothing was changed; {go_on}")
    plan = Plan.read(folder)
    if (folder / "report.md").exists():
        finished = f"{folder} is finished: all {several(plan.steps, 'step')} are trained"
        say("done", f"{finished}; `{command('sample', folder)}` shows what it learned")
        return 0
    plugins.require(plan.config.plugin, imported, folder)
    try:
        plan.config.check()
    except TypeError as error:
        raise Refusal(_altered(folder, error)) from error
    shards.check(plan.config)
    with joined(plan.config.torch_device().type) as ranks, ExitStack() as stack:
        stack.enter_context(stops.heard())
        console = Console(stops.note, ranks.speaks)
        if ranks.speaks:
            stack.enter_context(locked(folder))
        stack.enter_context(console.warnings())
        try:
            run = _go_on(folder, plan, console, stops, ranks)
        except OSError as error:
            raise Refusal(disk_words(error, folder, "nothing was changed", go_on)) from error
        return run.train()


def _go_on(folder: Path, plan: Plan, console: Console, stops: Stops, ranks: Ranks) -> Run:
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
    with ranks.one_first():
        corpus, tokens = _read(plan.config, console, tokenizer_file, plan.fingerprint)
    trainer = Trainer(plan.config, tokens, plan.steps, lambda: ranks.check(stops), ranks)
    seconds = 0.0
    last = checkpoint.newest(folder / "state", lambda fault: console.say("warning", fault))
    if last is not None:
        try:
            with trainer.filling() as model:
                progress = checkpoint.restore(last, model, trainer.optimizer)
            trainer.remember(checkpoint.remembered(last, trainer.device))
        except (RuntimeError, ValueError, KeyError) as error:
            raise Refusal(_altered(folder, error)) from error
        trainer.step, seconds = progress["step"], progress["seconds"]
        trainer.scaler.load_state_dict(progress["scaler"])
    console.say("resume", f"{folder} from step {trainer.step} of {plan.steps}", f"threads {plan.threads}, as before")
    with ranks.one_first():
        metrics = Metrics(folder / "metrics.jsonl", trainer.step, ranks.speaks)
    return Run(folder, plan, trainer, tokens, corpus, console, metrics, stops, ranks, seconds)


def _altered(folder: Path, error: Exception) -> str:
    why = " ".join(str(error).split())[:200]
    return f"{folder / 'run.json'} is not what the run began with ({why}); restore it, or start a new run"


def _read(
    config: Config, console: Console, tokenizer_file: Path | None = None, fingerprint: str | None = None
) -> tuple[Corpus, Tokens]:
    """Find the text and its ids, and say what they are. Raises Refusal if the text is not the one a run began with."""
    if config.plugin:
        console.say("plugin", *config.plugin)
    corpus = find(config.data, config.text_key)
    console.say_all(lines.of_text(corpus))
    if fingerprint not in (None, corpus.fingerprint):
        changed = f"{'--data ' * bool(config.data)}{corpus.name} changed since the run began"
        now = f"its SHA-256 was {fingerprint[:12]} and is {corpus.fingerprint[:12]}"
        raise Refusal(f"{changed}: {now}; restore it, or start a new run")
    memory.check(config, corpus.bytes)
    building = f"building a vocabulary of {config.vocab:,} and encoding the text, once"
    tokens = tokenize(corpus, config.vocab, tokenizer_file, lambda: console.say("tokens", building))
    console.say_all(lines.of_tokens(config, tokens))
    return corpus, tokens

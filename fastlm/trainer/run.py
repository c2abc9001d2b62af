"""A run from its first line to its last: prepare, measure, train, write; and the same again from a checkpoint.

runs/<date-time>/  run.json  metrics.jsonl  sample.txt  state/  tokenizer.json      from the start
                   model.safetensors  config.json  loss.png  report.md              at the end; report.md is the last
"""

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm import __version__
from fastlm.trainer import checkpoint, plugins
from fastlm.trainer.budget import SAMPLES, dtype_cost, measure
from fastlm.trainer.config import Config
from fastlm.trainer.data.corpus import Corpus, find
from fastlm.trainer.data.tokens import Tokens, sha256, tokenize
from fastlm.trainer.outputs import artefacts, lines
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.metrics import Metrics
from fastlm.trainer.plan import Plan, environment, locked, new_folder
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Failure, Refusal, command, several

JUDGED_FROM = 100  # steps from which a run must have passed the unigram line to count as a success


def pretrain(config: Config, argv: list[str]) -> int:
    """Train a model from nothing; return the exit status. Raises Refusal before any work is lost, Failure if training
    fails."""
    plugins.load(config.plugin)
    config.check()
    console = Console()
    with new_folder(config.out) as folder, console.warnings():
        return _begin(folder, config.settled(), argv, console).train()


def _begin(folder: Path, config: Config, argv: list[str], console: Console) -> "Run":
    """Read the text, measure, write down the plan: a run before its first step."""
    where = environment(config)
    console.say_all(lines.of_machine(config, where, dtype_cost(config)))
    corpus, tokens = _read(config, console)
    console.say_all(lines.of_model(config, tokens))
    budget = measure(config, tokens)
    plan = Plan(
        __version__,
        command(*argv),
        config,
        budget.steps,
        budget.threads,
        corpus.fingerprint,
        sha256(tokens.tokenizer_file),
        where,
    )
    trainer = Trainer(config, tokens, plan.steps)
    console.say_all(lines.of_plan(plan, budget, trainer, tokens))
    (folder / "state").mkdir()
    shutil.copyfile(tokens.tokenizer_file, folder / "tokenizer.json")
    plan.write(folder)
    console.say("writes", f"{folder}/")
    return Run(folder, plan, trainer, tokens, corpus, console, Metrics(folder / "metrics.jsonl", 0), 0.0)


def resume(folder: Path, given: tuple[str, ...] = ()) -> int:
    """Go on with an interrupted run, exactly as if it had not been; return the exit status. Raises Refusal, Failure.

    given: the plugins that were imported for it.
    """
    console, plan = Console(), Plan.read(folder)
    if (folder / "report.md").exists():
        finished = f"{folder} is finished: all {several(plan.steps, 'step')} are trained"
        console.say("done", f"{finished}; `{command('sample', folder)}` shows what it learned")
        return 0
    plugins.require(plan.config.plugin, given, folder)
    plan.config.check()
    with locked(folder), console.warnings():
        return _go_on(folder, plan, console).train()


def _go_on(folder: Path, plan: Plan, console: Console) -> "Run":
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
    corpus, tokens = _read(plan.config, console, tokenizer_file, plan.fingerprint)
    trainer, seconds = Trainer(plan.config, tokens, plan.steps), 0.0
    last = checkpoint.newest(folder / "state", lambda fault: console.say("warning", fault))
    if last is not None:
        facts = checkpoint.restore(last, trainer.model, trainer.optimizer)
        trainer.step, seconds = facts["step"], facts["seconds"]
        trainer.scaler.load_state_dict(facts["scaler"])
    console.say("resume", f"{folder} from step {trainer.step} of {plan.steps}", f"threads {plan.threads}, as before")
    return Run(folder, plan, trainer, tokens, corpus, console, Metrics(folder / "metrics.jsonl", trainer.step), seconds)


@dataclass
class Run:
    """A run under way. seconds: spent on it before this process, which began at step `first`, at the clock's `begun`;
    aside: seconds of this process that went not into updates."""

    folder: Path
    plan: Plan
    trainer: Trainer
    tokens: Tokens
    corpus: Corpus
    console: Console
    metrics: Metrics
    seconds: float
    first: int = 0
    begun: float = 0.0
    aside: float = 0.0

    def train(self) -> int:
        """Train to the last step, or to a signal; return the exit status."""
        self.first, self.begun = self.trainer.step, time.monotonic()
        saved = flushed = self.begun
        with stop_signals() as stopped:
            if "held_out_loss" not in self.metrics.last:
                self._evaluate()
            while self.trainer.step < self.plan.steps and not stopped:
                update = self.trainer.update()
                self.metrics.add(self.trainer.step, self.elapsed, self.updating, update)
                if time.monotonic() - flushed >= 1:
                    self._flush()
                    flushed = time.monotonic()
                self._look()
                if time.monotonic() - saved >= self.plan.config.save_every:
                    self._save()
                    saved = time.monotonic()
            self._save()
        if self.trainer.step < self.plan.steps:
            done = f"after step {self.trainer.step:,} of {self.plan.steps:,}, saved"
            self.console.say("stopped", f"{done}; go on with `{command('resume', self.folder)}`")
            return 128 + stopped[0]
        return self._finish()

    @property
    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.begun

    @property
    def updating(self) -> float:
        """Seconds that this process has spent on updates alone."""
        return time.monotonic() - self.begun - self.aside

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is no part of updates: evaluations, samples, checkpoints."""
        self._flush()  # waits for the updates under way
        begun = time.monotonic()
        yield
        self.aside += time.monotonic() - begun

    def _look(self) -> None:
        """What is due after this step: an evaluation, a sample (only of a model that was found sound), the progress
        line."""
        step, steps = self.trainer.step, self.plan.steps
        sampling = due(step, steps, SAMPLES)
        if sampling or due(step, steps, self.plan.config.evaluations):
            self._evaluate()
        if sampling:
            self._sample()
        if self.console.due() or step == steps:
            self._flush()
            self.console.progress(self._progress())

    def _evaluate(self) -> None:
        """Measure the held-out loss and write it down. Raises Failure if it is not finite."""
        step = self.trainer.step
        with self._aside():
            found = self.trainer.evaluate(glance=step < self.plan.steps)
        row = {"step": step, "tokens": step * self.trainer.tokens_per_update, "seconds": round(self.elapsed, 3)}
        self.metrics.write(row | {f"held_out_{name}": value for name, value in found.items()})
        if not math.isfinite(found["loss"]):
            raise self._divergence(f"the held-out loss is {found['loss']} at step {step}")
        self.console.say(*lines.of_evaluation(self.trainer, self.metrics.last))

    def _sample(self) -> None:
        with self._aside():
            text = self.trainer.sample()
            self.metrics.write({"step": self.trainer.step, "sample": text})
            artefacts.write_samples(self.metrics, self.folder / "sample.txt")
        self.console.say("sample", repr(text[:160]))

    def _progress(self) -> list[str]:
        step, steps = self.trainer.step, self.plan.steps
        made = step - self.first
        left = (steps - step) * (time.monotonic() - self.begun) / max(1, made)
        speed = made * self.trainer.tokens_per_update / max(1e-9, self.updating)
        return lines.of_progress(step, steps, left, speed, self.metrics.last)

    def _flush(self, to_disk: bool = False) -> None:
        """Write the rows that wait. Raises Failure if an update was made with a loss that is not finite."""
        self.metrics.flush(to_disk)
        if self.metrics.diverged is not None:
            raise self._divergence(f"the loss is not finite at step {self.metrics.diverged}")

    def _divergence(self, what: str) -> Failure:
        """Resuming would repeat it to the bit, so the advice is another run."""
        cure = f"start a new run with a lower --lr ({self.plan.config.lr:g}) or a longer --warmup"
        return Failure(f"{what}: training diverged; {cure}")

    def _save(self) -> None:
        """Write a checkpoint that is worth going on from, and what is before it first. Raises Failure if it would not
        be."""
        self._flush(to_disk=True)
        if not self.trainer.finite():
            raise self._divergence(f"a parameter is not finite after step {self.trainer.step}")
        facts = {"seconds": self.elapsed, "scaler": self.trainer.scaler.state_dict()}
        with self._aside():
            checkpoint.save(self.folder / "state", self.trainer.step, self.trainer.model, self.trainer.optimizer, facts)

    def _finish(self) -> int:
        """Write what is left to write, say how it went, and return the exit status."""
        artefacts.write_weights(self.trainer, self.folder)
        artefacts.write_plot(self.metrics, self.tokens, self.folder / "loss.png")
        artefacts.write_report(
            self.plan, self.corpus, self.tokens, self.trainer, self.metrics, self.folder / "report.md"
        )
        self.console.say_all(lines.of_end(self.folder, self.trainer, self.tokens, self.metrics.last, self.elapsed))
        return self._verdict(self.metrics.last["held_out_loss"], self.tokens.facts.unigram_nats)

    def _verdict(self, loss: float, unigram: float) -> int:
        if loss < unigram:
            return 0
        verdict = f"the held-out loss {loss:.3f} is not below the unigram line {unigram:.3f}"
        if self.plan.steps < JUDGED_FROM:
            self.console.say("note", f"{verdict}, which is no failure before step {JUDGED_FROM}")
            return 0
        self.console.say(
            "failed", f"{verdict}: the model learned nothing from context; try another --lr, or more --minutes"
        )
        return 1


def due(step: int, steps: int, times: int) -> bool:
    """Whether `step` is one of the `times` steps, spread evenly up to the last, at which something happens."""
    return step * times // steps > (step - 1) * times // steps


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM puts its number in, instead of ending the process; the second one ends
    it."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield seen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        seen.append(number)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        restore()


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
    building = f"building a vocabulary of {config.vocab:,} and encoding the text, once"
    tokens = tokenize(corpus, config.vocab, tokenizer_file, lambda: console.say("tokens", building))
    console.say_all(lines.of_tokens(config, tokens))
    return corpus, tokens

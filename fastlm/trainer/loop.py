"""The loop of a run: update, look, save, to the last step or until something stops it; then what a finished run leaves.

Between two updates the weights, the optimizer's state and the step are all there is to go on from, so that is where a
run stops: for a signal, for an output that nobody reads, for a disk that is full.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastlm.models import Transformer
from fastlm.models.heads import Headed
from fastlm.trainer import checkpoint
from fastlm.trainer.budget import SAMPLES, due
from fastlm.trainer.distributed.ranks import Ranks, noticing
from fastlm.trainer.material import Material
from fastlm.trainer.outputs import artefacts, lines
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.metrics import Metrics
from fastlm.trainer.patience import Patience
from fastlm.trainer.plan import Plan
from fastlm.trainer.signals import Stopped, Stops
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import Failure, command, disk_words, several

JUDGED_FROM = 100  # steps from which a run must be better than what has learned nothing to count as a success


@dataclass
class Run:
    """A run under way. seconds: spent on it before this process, which began at step `first`, at the clock's `begun`;
    aside: seconds of this process that went not into updates; kept: the step that was last saved.
    """

    folder: Path
    plan: Plan
    trainer: Trainer
    material: Material
    console: Console
    metrics: Metrics
    stops: Stops
    ranks: Ranks
    patience: Patience
    seconds: float
    first: int = 0
    kept: int = -1
    begun: float = field(default_factory=time.monotonic)
    aside: float = 0.0

    def train(self) -> int:
        """Train to the last step, or until something stops it; return the exit status. Raises Failure."""
        self.first, self.begun = self.trainer.step, time.monotonic()
        self.stops.deferred = True
        with self._disk(), noticing(f"go on with `{command('resume', self.folder)}`"):
            try:
                self._advance()
                return self._finish()
            except Stopped as stop:
                self.save()
                done = f"after step {self.trainer.step:,} of {self.plan.steps:,}, saved"
                self.console.say("stopped", f"{done}; go on with `{command('resume', self.folder)}`")
                return stop.status
            finally:
                self.metrics.close()

    def _advance(self) -> None:
        """Train to the last step and save it. Raises Stopped between two updates."""
        saved = flushed = self.begun
        self._look()
        while self.trainer.step < self.plan.steps and not self.patience.over:
            update = self.trainer.update()
            self.metrics.add(self.trainer.step, self.elapsed, self.updating, update)
            if time.monotonic() - flushed >= 1:
                self._flush()
                flushed = time.monotonic()
            self._look()
            if self.ranks.any(time.monotonic() - saved >= self.plan.config.save_every):
                self.save()
                saved = time.monotonic()
        if self.patience.over:
            self._look_at_the_end()
        self.save()

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
        """What is due after this step, and was not done before the run was stopped: an evaluation, a sample (only of a
        model that was found sound), the progress line.
        """
        step, steps = self.trainer.step, self.plan.steps
        done = self.metrics.opened_with if step == self.first else ()
        sampling = step > 0 and due(step, steps, SAMPLES)
        looking = sampling or due(step, steps, self.plan.looks.evaluations) or step == 0
        if (
            looking and "held_out_loss" not in done
        ) or "held_out_loss" not in self.metrics.last:  # metrics.jsonl was lost
            self._evaluate(self.plan.looks.windows if step < steps else self.plan.looks.last)
        if looking and self.patience.allowed is not None:
            self._judge()
        if sampling:
            self._sample(anew="sample" not in done)
        if step > self.first and (self.console.due() or step == steps):
            self._flush()
            self.console.progress(self._progress())

    def _look_at_the_end(self) -> None:
        """What is due after the last step, which the newest one turned out to be."""
        step, looks = self.trainer.step, self.plan.looks
        if self.metrics.last.get("held_out_windows") != looks.last:
            self._evaluate(looks.last)
        sampled = "sample" in self.metrics.opened_with and step == self.first
        if not sampled and not due(step, self.plan.steps, SAMPLES):
            self._sample(anew=True)

    def _evaluate(self, windows: int) -> None:
        """Measure the held-out loss and write it down. Raises Failure if it is not finite."""
        step = self.trainer.step
        with self._aside():
            found = self.trainer.evaluate(windows)
        row = {"step": step, "tokens": self.trainer.tokens_before(step), "seconds": round(self.elapsed, 3)}
        row["held_out_windows"] = windows
        self.metrics.write(row | {f"held_out_{name}": value for name, value in found.items()})
        if not math.isfinite(found["loss"]):
            raise self._divergence(f"the held-out loss is {found['loss']} at step {step}")
        self.console.say(*lines.of_evaluation(self.trainer, windows, self.metrics.last))

    def _judge(self) -> None:
        """Count this step's evaluation towards --patience, and keep the weights in best/ if none was better. All
        evaluations that are compared are of the same windows.
        """
        step, last, windows = self.trainer.step, self.metrics.last, self.plan.looks.windows
        if self.patience.counted == step:  # before the run was stopped
            return
        with self._aside():
            loss = last["held_out_loss"]
            if last.get("held_out_windows") != windows:
                loss = self.trainer.evaluate(windows)["loss"]
            better = self.ranks.any(self.patience.better(loss))
            if better:
                model = self.trainer.whole()
                if self.ranks.speaks:
                    exported = self.trainer.exported(model)
                    artefacts.write_best(exported, self.trainer.train, self.material.sides.tokenizer_file, self.folder)
        self.patience.count(step, loss, better)

    def _sample(self, anew: bool) -> None:
        with self._aside():
            if anew:
                text = self.trainer.sample(self.plan.looks.sample)
                self.metrics.write({"step": self.trainer.step, "sample": text})
            if self.ranks.speaks:
                artefacts.write_samples(self.metrics, self.folder / "sample.txt")
        self.console.say("sample", repr(self.metrics.last["sample"][:160]))

    def _progress(self) -> list[str]:
        step, steps = self.trainer.step, self.plan.steps
        made = step - self.first
        left = (steps - step) * (time.monotonic() - self.begun) / max(1, made)
        seen = self.trainer.tokens_before(step) - self.trainer.tokens_before(self.first)
        speed = seen / max(1e-9, self.updating)
        memory = max(map(len, self.trainer.recurrences), default=0)
        shares = lines.shares(self.trainer.held_out, self.metrics.last)
        return lines.of_progress(step, steps, left, speed, self.metrics.last, shares, memory, self.metrics.clipped)

    def _flush(self, to_disk: bool = False) -> None:
        """Write the rows that wait. Raises Failure if an update was made with a loss that is not finite, or updates
        are skipped for such gradients.
        """
        self.metrics.flush(to_disk)
        if self.metrics.diverged is not None:
            raise self._divergence(f"the loss is not finite at step {self.metrics.diverged}")
        if self.metrics.skipping(self.plan.steps):
            skipped = f"{self.metrics.skipped:,} of {several(self.trainer.step, 'update')}"
            raise self._divergence(f"{skipped} were skipped, for their gradients were not finite")

    def _divergence(self, what: str) -> Failure:
        """Resuming would repeat it to the bit, so the advice is another run."""
        cure = f"start a new run with a lower --lr ({self.plan.config.lr:g}) or a longer --warmup"
        return Failure(f"{what}: training diverged; {cure}")

    def save(self) -> None:
        """Write a checkpoint that is worth going on from, and what is before it first. Raises Failure if it would not
        be.
        """
        if self.trainer.step == self.kept:
            return
        self._flush(to_disk=True)
        if not self.trainer.finite():
            raise self._divergence(f"a parameter is not finite after step {self.trainer.step}")
        progress = {"seconds": self.elapsed, "scaler": self.trainer.scaler.state_dict()}
        progress["patience"] = self.patience.state_dict()
        with self._aside():
            model, states = self.trainer.whole(), self.trainer.division.whole_states(self.trainer.optimizer)
            if self.ranks.speaks:
                recurrences = self.trainer.recurrences
                checkpoint.save(self.folder / "state", self.trainer.step, model, states, progress, recurrences)
        self.kept = self.trainer.step

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A file that cannot be written ends the run: what can be saved is saved, and what there is to go on from is
        said in one line, a Failure.
        """
        try:
            yield
        except OSError as error:
            if self.ranks.world == 1:  # others know nothing of it, and would be waited for
                with suppress(OSError):
                    self.save()
            saved = [folder.name.replace("step-", "step ") for folder in checkpoint.saved(self.folder / "state")]
            held = f"{saved[0]} of {self.plan.steps:,} is saved" if saved else "no step is saved yet"
            go_on = f"go on with `{command('resume', self.folder)}`"
            raise Failure(disk_words(error, self.folder, held, go_on)) from error

    def _finish(self) -> int:
        """Write what is left to write, say how it went, and return the exit status."""
        model = self.trainer.whole()
        if self.ranks.speaks:
            self._write(self.trainer.exported(model))
        return self._verdict()

    def _write(self, exported: Transformer | Headed) -> None:
        """The files of a finished run, report.md as the last, and the lines of its end."""
        self.stops.check()
        artefacts.write_weights(exported, self.trainer.train, self.folder)
        self.stops.check()
        artefacts.write_plot(self.metrics, self.material, self.trainer.held_out, self.folder / "loss.png")
        self.stops.check()
        report = self.folder / "report.md"
        artefacts.write_report(self.plan, self.material, self.trainer, exported, self.metrics, self.patience, report)
        last = self.metrics.last
        self.console.say_all(lines.of_patience(self.trainer.step, self.plan.steps, self.patience))
        self.console.say_all(lines.of_end(self.folder, self.trainer, exported, self.material, last, self.elapsed))

    def _verdict(self) -> int:
        """The exit status that the newest metrics deserve."""
        failure = self.material.failure(self.trainer.held_out, self.metrics.last)
        if failure is None:
            return 0
        short, why = failure
        if self.trainer.step < JUDGED_FROM:
            self.console.say("note", f"{short}, which is no failure before step {JUDGED_FROM}")
            return 0
        self.console.say("failed", f"{short}: {why}")
        return 1

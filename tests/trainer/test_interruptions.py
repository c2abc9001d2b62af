"""Whatever ends a run, and whenever: it goes on to the same bits, or a line says that nothing was begun and nothing is
left of it.
"""

import errno
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout

import pytest
from runs import config, flags, repeatable, train, write_text

from fastlm.objectives import Causal
from fastlm.trainer import checkpoint, signals
from fastlm.trainer.commands import ready, run
from fastlm.trainer.data import tokens
from fastlm.trainer.outputs import artefacts
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.words import Failure, Refusal

resource = pytest.importorskip("resource", reason="Windows has neither these signals nor limits on files")

SHORT = dict(steps=5, evaluations=2, dropout=0.1, accumulate=2, save_every=0.0)


@pytest.fixture(autouse=True)
def every_signal_is_heard():
    """Those that nohup, or a shell for what runs in its background, has ignored too."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A text, a cache for it, and a run over it that nothing interrupts."""
    folder = tmp_path_factory.mktemp("home")
    write_text(folder / "text.txt", seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert train(folder / "text.txt", folder / "whole", **SHORT) == 0
        yield folder


class Output(io.StringIO):
    """A stdout whose reader may go away."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return super().write(text)


@contextmanager
def limited_files():
    """Inside, what is put into the function that is yielded is as full as a disk can be: no file grows."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def at(owner: object, name: str, n: int, do: Callable[[], None]):
    """Inside, `do` is called at the n-th call of a function, which must come."""
    real, calls = getattr(owner, name), []

    def then(*args, **options):
        calls.append(1)
        if len(calls) == n:
            do()
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, then)
        yield
    assert len(calls) >= n


MOMENTS = {
    "reading": (run, "find", 1),
    "vocabulary": (tokens.tokenizer, "train", 1),
    "begin": (ready, "Metrics", 1),
    "first-evaluation": (Causal, "fixed", 2),
    "updates": (Causal, "batch", 8),  # in the third update; one batch is reckoned with, two are measured
    "saving": (checkpoint, "_write", 3),
    "last-evaluation": (Causal, "fixed", 23),  # of five evaluations in five batches each
    "artefacts": (artefacts, "write_plot", 1),
}
BEFORE = ("reading", "vocabulary", "begin")
ENDS = ("SIGINT", "SIGTERM", "SIGHUP", "closed-output", "full-disk")


def outcome(command: Callable[[], int]) -> tuple[int, str]:
    """The exit status, and the line that it ends with if it raises."""
    try:
        return command(), ""
    except (signals.Stopped, Refusal, Failure) as error:
        return getattr(error, "status", 1), str(error)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_it_goes_on_to_the_same_bits_or_nothing_was_begun(home, tmp_path, monkeypatch, capsys, moment, end):
    if moment in ("reading", "vocabulary"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output, folder = Output(), tmp_path / "run"
    with limited_files() as fill, redirect_stdout(output):
        ends = {"closed-output": lambda: setattr(output, "gone", True), "full-disk": fill}
        with at(*MOMENTS[moment], ends.get(end) or (lambda: signal.raise_signal(signal.Signals[end]))):
            status, line = outcome(lambda: train(home / "text.txt", folder, **SHORT))
    line = line or (capsys.readouterr().err if output.gone else output.getvalue()).splitlines()[-1]
    assert "\n" not in line
    assert folder.exists() == (moment not in BEFORE or (moment, end) == ("begin", "closed-output"))
    if not folder.exists():
        assert "nothing was begun" in line or "the cache" in line
        assert not list(tmp_path.rglob(".tmp-*"))
        return
    if (folder / "report.md").exists():  # its last line went nowhere
        assert (moment, end, status) == ("artefacts", "closed-output", 0)
    else:
        assert f"go on with `fastlm resume {folder}`" in line
        assert status == (128 + signal.Signals[end] if end.startswith("SIG") else 1)
    assert run.resume(folder) == 0
    assert repeatable(folder) == repeatable(home / "whole")
    assert (folder / "sample.txt").read_bytes() == (home / "whole" / "sample.txt").read_bytes()
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.parametrize("end", ENDS)
def test_a_resumption_that_is_stopped_changes_nothing(home, tmp_path, capsys, end):
    folder = tmp_path / "run"
    with at(Causal, "batch", 8, lambda: signal.raise_signal(signal.SIGTERM)):
        assert train(home / "text.txt", folder, **SHORT) == 128 + signal.SIGTERM
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    output = Output()
    with limited_files() as fill, redirect_stdout(output):
        ends = {"closed-output": lambda: setattr(output, "gone", True), "full-disk": fill}
        with at(run, "find", 1, ends.get(end) or (lambda: signal.raise_signal(signal.Signals[end]))):
            status, line = outcome(lambda: run.resume(folder))
    assert status and "nothing was changed" in line and line.endswith(f"go on with `fastlm resume {folder}`")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run.resume(folder) == 0 and repeatable(folder) == repeatable(home / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Processes of their own


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fastlm", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("seconds", (0.0, 0.3))
def test_a_signal_while_torch_is_imported_is_one_line(home, tmp_path, seconds):
    process = start("pretrain", *flags(config(home / "text.txt", tmp_path / "run", steps=10**6)))
    assert process.stdout.readline().startswith("fastlm ")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "\nfastlm: stopped by SIGINT: nothing was begun\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_is_heard_while_the_vocabulary_is_built(tmp_path, monkeypatch):
    """Training it is one call into compiled code, here of half a minute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=2_000_000)))
    process = start("pretrain", *flags(config(text, tmp_path / "run", vocab=20_000)))
    while not process.stdout.readline().startswith("tokens "):
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 60  # it would take hours, and a busy machine seconds
    assert process.returncode == 130 and err == "\nfastlm: stopped by SIGINT: nothing was begun\n"
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache" / "fastlm").iterdir())


def test_a_pipe_whose_reader_leaves(home, tmp_path):
    process = start("pretrain", *flags(config(home / "text.txt", tmp_path / "run", steps=10**6, save_every=1e9)))
    while not process.stdout.readline().startswith("held out"):
        pass
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert err.startswith("stopped  after step ") and err.endswith(f"go on with `fastlm resume {tmp_path / 'run'}`\n")
    assert err.count("\n") == 1 and len(checkpoint.saved(tmp_path / "run" / "state")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.fixture
def default_handlers():
    """A shell has what it starts in the background ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_waits_where_it_has_to_and_the_second_does_not(default_handlers):
    stops = signals.Stops("before")
    with stops.heard():
        stops.deferred = True
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals.Stopped, match="stopped by SIGTERM: before") as stopped:
            stops.check()
        with pytest.raises(KeyboardInterrupt) as second:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.status == 143 and not isinstance(second.value, signals.Stopped)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_an_import_makes_of_a_stop_is_a_stop(default_handlers):
    with pytest.raises(signals.Stopped), signals.Stops("before").heard():
        try:
            signal.raise_signal(signal.SIGINT)
        except signals.Stopped:
            raise ImportError("a compiled module was interrupted") from None


def test_nohup_holds(default_handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.Stops("before").heard():
        signal.raise_signal(signal.SIGHUP)


def test_work_is_done_awake(default_handlers):
    assert signals.awake(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        signals.awake(lambda: 1 / 0)
    signal.signal(signal.SIGALRM, lambda number, frame: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(ZeroDivisionError):  # in this thread, while the other one sleeps
        signals.awake(lambda: time.sleep(20))


def test_a_console_that_nobody_hears_says_so_once(capsys):
    heard, output = [], Output()
    with redirect_stdout(output):
        console = Console(heard.append)
        console.say("label", "one")
        output.gone = True
        console.say("label", "two")
        console.progress(["three"])
        console.say("label", "four")
    assert heard == ["the output cannot be written (Broken pipe)"]
    assert output.getvalue() == "label    one\n" and capsys.readouterr().err == "three\nlabel    four\n"

"""The command line: `fastlm pretrain`, `finetune`, `resume`, `sample`, `predict`, `evaluate`, `reproduce`,
`data`, `info`.

What cannot be done is said in one line on stderr, with exit status 2, before any work; a run that fails has status 1,
and one that was stopped 128 plus the signal. Importing torch takes seconds, so the first line is printed, and what is
mistyped is refused, before it is imported.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from fastlm import __version__
from fastlm.trainer.distributed.ranks import may_tell
from fastlm.trainer.options import plugins
from fastlm.trainer.options.files import expanded
from fastlm.trainer.options.flags import listed, parse
from fastlm.trainer.outputs.console import discard_output
from fastlm.trainer.signals import Stopped, Stops
from fastlm.trainer.words import FULL, Failure, Refusal, did_you_mean, processes, say

if TYPE_CHECKING:
    from fastlm.trainer.options.training import Training

USAGE = """usage: fastlm COMMAND [--help] | --version

  pretrain      train a language model; without a flag, from nothing, for two minutes on Python's own sources
  finetune DIR  teach a trained model a task, by labelled rows
  resume DIR    go on with an interrupted run, exactly where it was
  sample DIR    let a trained model write
  predict DIR FILE    what a fine-tuned model says of the rows of a file
  evaluate DIR  measure a trained model over a text
  reproduce NAME   a small counterpart of a paper's table or figure, in minutes; --all for every one
  data clean|pack|inspect   text made clean; text as ids, written once for any number of runs; what is there
  info          what this machine can run, what is missing, and the cure
"""
INFO = """usage: fastlm info [--presets [NAME...]]

What this machine can run, what is missing, and the cure. With --presets: the parameters of each preset, or of those
that are named, and the memory that training it in fp32 takes with each optimizer, activations aside.
"""
EXTRA = ("numpy", "tokenizers", "safetensors", "tyro", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if processes() > 1:  # DDP warns of unused parameters that it looks for and does not find
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.stdout, sys.stderr = map(_usable, (sys.stdout, sys.stderr))
    try:
        with contextlib.suppress(OSError):  # what is said next finds it too, and knows what to do
            if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, the first one speaks
                shows = argv[:1] in (["sample"], ["predict"])  # on stdout what a model says, and nothing else
                print(f"fastlm {__version__}", flush=True, file=sys.stderr if shows else sys.stdout)
        status = _run(argv)
        sys.stdout.flush()
        return status
    except (Refusal, Failure) as error:
        return _tell(f"fastlm: {error}", 2 if isinstance(error, Refusal) else 1)
    except Stopped as stop:
        after_echo = "\n" * (stop.status == 130)  # of ^C
        return _tell(f"{after_echo}fastlm: {stop}", stop.status)
    except KeyboardInterrupt:
        return _tell("\nstopped", 130)
    except BrokenPipeError:  # who read us is gone, as after `| head`
        discard_output()
        return 1
    except OSError as error:
        if error.errno not in FULL:
            raise
        discard_output()
        return _tell(f"fastlm: {error.filename or 'the output'}: {error.strerror}; free some space", 1)


def _usable(stream: TextIO | None) -> TextIO:
    """Where a closed stream writes into the void, and a terminal without ━ shows ? instead of failing."""
    stream = stream or open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    stream.reconfigure(errors="replace")
    return stream


def _tell(line: str, status: int) -> int:
    Stops.told = True  # torchrun ends the other processes by a signal
    if not may_tell():
        return status
    with contextlib.suppress(OSError):  # the terminal may be what is gone
        print(line, file=sys.stderr)
    return status


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:  # said already
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = did_you_mean(name, (*COMMANDS, "--help", "--version"))
        raise Refusal(f"no command is named {name}{near}; choose from {', '.join(COMMANDS)}")
    return COMMANDS[name](rest)


@contextlib.contextmanager
def _machine() -> Iterator[None]:
    """What FASTLM_ISA and FASTLM_BACKEND ask for is there, or a Refusal says that it is not."""
    import torch

    from fastlm.backends.dispatch import BackendError
    from fastlm.backends.native import cpp_missing

    try:
        cpp_missing(torch.device("cpu"))
    except ValueError as error:
        raise Refusal(f"FASTLM_ISA: {error}") from error
    try:
        yield
    except BackendError as error:
        raise Refusal(str(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def pretrain(argv: list[str]) -> int:
    _ready(argv)
    from fastlm.trainer.options.config import Config

    config, words = _training(Config, argv)
    from fastlm.trainer.commands import run

    with _machine():
        return run.pretrain(config, words)


def finetune(argv: list[str]) -> int:
    _ready(argv)
    from fastlm.trainer.options.finetune import FineTune

    config, words = _training(FineTune, argv)
    from fastlm.trainer.commands import finetune

    with _machine():
        return finetune.finetune(config, words)


def resume(argv: list[str]) -> int:
    asked = _of_folder("resume", argv)
    from fastlm.trainer.commands import run

    with _machine():
        return run.resume(asked.folder, asked.plugin)


def sample(argv: list[str]) -> int:
    asked = _of_folder("sample", argv)
    from fastlm.trainer.commands import sampling

    with _machine():
        sampling.write(asked, lambda piece: print(piece, end="", flush=True), _note)
    return 0


def predict(argv: list[str]) -> int:
    asked = _of_folder("predict", argv)
    from fastlm.trainer.commands import predicting

    with _machine():
        predicting.write(asked, lambda line: print(line, flush=True), _note)
    return 0


def evaluate(argv: list[str]) -> int:
    asked = _of_folder("evaluate", argv)
    from fastlm.trainer.commands import evaluating

    with _machine():
        evaluating.evaluate(asked, say)
    return 0


def reproduce(argv: list[str]) -> int:
    _check_extra()
    from fastlm.trainer.options.reproduce import Reproduce

    asked = parse(Reproduce, "reproduce", ["all" if word == "--all" else word for word in argv])
    asked.check()
    from fastlm.trainer.commands import reproducing

    with _machine():
        reproducing.reproduce(asked, say)
    return 0


def data(argv: list[str]) -> int:
    _check_extra()
    from fastlm.trainer.options.data import COMMANDS as kinds

    name, *rest = argv or [""]
    if name not in kinds:
        raise Refusal(f"data {name}: no command{did_you_mean(name, kinds)}; choose from {', '.join(kinds)}")
    asked = parse(kinds[name], f"data {name}", rest)
    asked.check()
    from fastlm.trainer.commands.data import command_of

    command_of(name)(asked, say)
    return 0


def _ready(argv: list[str]) -> None:
    """Plugins come before the configuration, whose choices are what is registered."""
    _check_extra()
    plugins.load(listed(argv, "plugin"))


def _training(kind: type, argv: list[str]) -> tuple["Training", list[str]]:
    """The configuration that the words ask for, and the words with those of a --config in its place."""
    argv = expanded(argv, kind, kind.command)
    config = parse(kind, kind.command, argv)
    config.check_values()  # again when the run begins; here it does not wait for torch
    return config, [kind.command, *argv]


def _of_folder(name: str, argv: list[str]):
    """What is asked of a command that reads a folder, an instance of its class in options/folders.py."""
    _check_extra()
    from fastlm.trainer.options import folders

    asked = parse(getattr(folders, name.capitalize()), name, argv)
    asked.check()
    folders.check_folder(asked.folder)
    plugins.load(asked.plugin)
    return asked


def _note(line: str) -> None:
    print(f"fastlm: {line}", file=sys.stderr)


def info(argv: list[str]) -> int:
    if argv and set(argv) <= {"-h", "--help"}:
        print(INFO)
        return 0
    if argv[:1] == ["--presets"]:
        return _presets(argv[1:])
    if argv:
        raise Refusal(f"info takes no arguments but --presets; got {' '.join(argv)}")
    import fastlm.ops  # noqa: F401 (all of them register)
    from fastlm.backends.info import describe

    with _machine():
        for line in describe():
            say(*line)
    return 0


def _presets(names: list[str]) -> int:
    from fastlm.trainer.options.choices import choices

    for name in names:
        if name not in choices("preset"):
            raise Refusal(f"--presets {name} is unknown{did_you_mean(name, choices('preset'))}")
    from fastlm.trainer.outputs.sizes import of_presets

    for line in of_presets(tuple(names)):
        print(line, flush=True)
    return 0


COMMANDS = {
    "pretrain": pretrain, "finetune": finetune, "resume": resume, "sample": sample, "predict": predict,
    "evaluate": evaluate, "reproduce": reproduce, "data": data, "info": info,
}  # fmt: skip


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise Refusal(f"training needs {', '.join(missing)}, not installed here; cure: pip install 'fastlm[train]'")

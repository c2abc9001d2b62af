"""The command line: `fastlm pretrain`, `resume`, `sample`, `info`.

Flags are made from dataclasses by tyro. What cannot be done is said in one line on stderr, with exit status 2, before
any work; a run that fails has status 1, and one that was stopped 128 plus the signal. Importing torch takes seconds, so
the first line is printed before anything heavy is imported."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TextIO

from fastlm import __version__
from fastlm.trainer import plugins
from fastlm.trainer.outputs.console import discard_output
from fastlm.trainer.signals import Stopped
from fastlm.trainer.words import Failure, Refusal, did_you_mean, say

USAGE = """usage: fastlm COMMAND [--help] | --version

  pretrain      train a language model from nothing; without a flag, for two minutes on Python's own sources
  resume DIR    go on with an interrupted run, exactly where it was
  sample DIR    let a trained model write
  info          what this machine can run, what is missing, and the cure
"""
EXTRA = ("numpy", "tokenizers", "safetensors", "tyro", "matplotlib")


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted run, exactly where it was."""

    folder: Path
    """The run's folder."""
    plugin: tuple[str, ...] = ()
    """The plugins it was made with."""


@dataclass(frozen=True)
class Sample:
    """Let a trained model write."""

    folder: Path
    """The run's folder."""
    prompt: str = ""
    """Text to continue; nothing for the start of a document."""
    tokens: int = 200
    """How many to write."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    seed: int = 0
    plugin: tuple[str, ...] = ()
    """The plugins the run was made with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without ━ shows ? instead of failing
    try:
        _greet(sys.stderr if argv[:1] == ["sample"] else sys.stdout)
        status = _run(argv)
        sys.stdout.flush()
        return status
    except (Refusal, Failure) as error:
        return _tell(f"fastlm: {error}", 2 if isinstance(error, Refusal) else 1)
    except Stopped as stop:
        return _tell(f"\nfastlm: {stop}", stop.status)
    except KeyboardInterrupt:
        return _tell("\nstopped", 130)
    except BrokenPipeError:  # who read us is gone, as after `| head`
        discard_output()
        return 1


def _tell(line: str, status: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be what is gone
        print(line, file=sys.stderr)
    return status


def _greet(file: TextIO) -> None:
    try:
        print(f"fastlm {__version__}", flush=True, file=file)
    except OSError as error:
        discard_output()
        raise Failure(f"the output cannot be written ({error.strerror}); nothing was begun") from error


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:  # said already
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        raise Refusal(
            f"no command is named {command}{did_you_mean(command, COMMANDS)}; choose from {', '.join(COMMANDS)}"
        )
    return COMMANDS[command](rest)


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
    _check_extra()
    plugins.load(_plugins(argv))  # before Config, whose choices are what is registered
    from fastlm.trainer import run
    from fastlm.trainer.config import Config

    config = parse(Config, "pretrain", argv)
    with _machine():
        return run.pretrain(config, ["fastlm", "pretrain", *argv])


def resume(argv: list[str]) -> int:
    _check_extra()
    plugins.load(_plugins(argv))
    from fastlm.trainer import run

    asked = parse(Resume, "resume", argv)
    with _machine():
        return run.resume(asked.folder, asked.plugin)


def sample(argv: list[str]) -> int:
    _check_extra()
    plugins.load(_plugins(argv))
    asked = parse(Sample, "sample", argv)
    if asked.tokens < 1:
        raise Refusal(f"--tokens is {asked.tokens}; it must be at least 1")
    if not (asked.temperature == 0 or asked.temperature >= 0.01):  # NaN is refused too
        raise Refusal(
            f"--temperature is {asked.temperature:g}; it must be 0, for the likeliest token each time, or at least 0.01"
        )
    if not 0 <= asked.seed < 2**63:
        raise Refusal(f"--seed is {asked.seed}; it must be from 0 to {2**63 - 1}")
    if not (asked.folder / "model.safetensors").exists():
        raise Refusal(
            f"{asked.folder} holds no trained model (no model.safetensors); `fastlm resume {asked.folder}` finishes a run"
        )
    import torch

    with _machine():
        model, tokenizer = _open(asked.folder, asked.plugin)
        from fastlm.trainer.data.tokenizer import EOS

        prompt = tokenizer.encode(asked.prompt).ids or [EOS]
        generator = torch.Generator().manual_seed(asked.seed)
        tokens = model.generate(torch.tensor([prompt]), asked.tokens, asked.temperature, generator)
        print(tokenizer.decode(tokens[0].tolist()))
    return 0


def _open(folder: Path, given: tuple[str, ...]):
    """The model and the tokenizer in a finished run's folder. Raises Refusal, naming the file, for what is missing or
    damaged."""
    from safetensors import SafetensorError

    from fastlm.interop import load_pretrained
    from fastlm.trainer.data.tokenizer import load_tokenizer
    from fastlm.trainer.plan import Plan

    if (folder / "run.json").exists():
        plugins.require(Plan.read(folder).config.plugin, given, folder)
    with _reading(folder / "config.json"):
        json.loads((folder / "config.json").read_text())
    with _reading(folder / "model.safetensors", SafetensorError, RuntimeError, TypeError):
        model = load_pretrained(folder)
    with _reading(folder / "tokenizer.json", Exception):  # tokenizers raises nothing narrower
        return model, load_tokenizer(folder / "tokenizer.json")


@contextlib.contextmanager
def _reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        raise Refusal(
            f"{path} cannot be read ({' '.join(str(error).split())}); it is missing, damaged or another program's"
        ) from error


def info(argv: list[str]) -> int:
    if argv and set(argv) <= {"-h", "--help"}:
        print("usage: fastlm info\n\nWhat this machine can run, what is missing, and the cure.")
        return 0
    if argv:
        raise Refusal(f"info takes no arguments; got {' '.join(argv)}")
    import fastlm.ops  # noqa: F401 (all of them register)
    from fastlm.backends.info import describe

    with _machine():
        for line in describe():
            say(*line)
    return 0


COMMANDS = {"pretrain": pretrain, "resume": resume, "sample": sample, "info": info}


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise Refusal(f"training needs {', '.join(missing)}, not installed here; cure: pip install 'fastlm[train]'")


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def _plugins(argv: list[str]) -> list[str]:
    """What --plugin names, read ahead of all other flags."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ahead.add_argument("--plugin", nargs="*", default=[])
    return ahead.parse_known_args(argv)[0].plugin


def parse(kind: type, command: str, argv: list[str]):
    """An instance of the dataclass `kind` from flags. Raises Refusal with one line for what does not fit; --help
    exits."""
    known = {"--" + field.name.replace("_", "-") for field in fields(kind)} | {"--help"}
    for word in argv:
        name = word.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise Refusal(
                f"{command} has no flag {word.split('=')[0]}{did_you_mean(name, known)}; `fastlm {command} --help` lists them"
            )
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=f"fastlm {command}", args=argv, config=(tyro.conf.PositionalRequiredArgs,))
    except SystemExit as end:
        if end.code == 0:  # --help was printed
            raise
        raise Refusal(f"{command}: {one_line(complaint.getvalue())}") from None


def one_line(box: str) -> str:
    """tyro's complaint, a box with a title and a helptext below a rule, as one sentence."""
    rows = [row.strip(" │|╭╮╰╯") for row in box.splitlines()][1:]
    body = " ".join(takewhile(lambda row: not _is_rule(row), dropwhile(_is_rule, rows)))
    text = re.sub(r"\s+", " ", body).strip().removesuffix(".")
    if found := re.match(r"Error parsing (\S+): no type matching (\S+) could be instantiated from \['(.*?)'\]", text):
        return f"{found[1]} {found[3]} is not a value it takes ({found[2]})"
    if found := re.match(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*)\)", text):
        choices = found[3].replace("'", "").rstrip(",").split(", ")
        return f"{found[2]} {found[1]} is unknown{did_you_mean(found[1], choices)}; choose from {', '.join(choices)}"
    if found := re.match(r"Missing from .*?: [A-Z]+ (.*?)\.? \(required\)", text):
        return f"one thing is missing: {found[1][0].lower()}{found[1][1:]}"
    return text.replace("Error parsing ", "")


def _is_rule(row: str) -> bool:
    return bool(row) and not row.strip("─-")

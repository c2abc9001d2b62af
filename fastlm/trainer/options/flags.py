"""Flags from dataclasses, by tyro; what does not fit is one sentence that names the flag, the value and the cure."""

import argparse
import contextlib
import io
import re
import sys
from dataclasses import fields
from itertools import dropwhile, takewhile
from typing import get_args, get_type_hints

from fastlm.trainer.words import Refusal, did_you_mean, flag

FLAG = re.compile(r"(--?[a-zA-Z][\w-]*)(=|$)")
NUMBERS = {"int": "a whole number", "float": "a number"}


def parse(kind: type, command: str, argv: list[str]):
    """An instance of the dataclass `kind` from flags. Raises Refusal with one line for what does not fit; --help
    exits.
    """
    known = {flag(name) for name in shown(kind)}
    for word in argv:
        if (found := FLAG.match(word)) and (name := found[1].replace("_", "-")) not in known | {"--help", "-h"}:
            near = did_you_mean(name, known)
            raise Refusal(f"{command} has no flag {found[1]}{near}; `fastlm {command} --help` lists them")
    variadic = [name for name, hint in get_type_hints(kind).items() if get_args(hint)[1:] == (...,)]
    lists, rest = _lists(argv, variadic)
    for name, values in lists.items():
        rest += [f"--{name}", *values] if values else []
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=f"fastlm {command}", args=rest, config=(tyro.conf.PositionalRequiredArgs,))
    except SystemExit as end:
        if end.code == 0:  # --help was printed
            sys.stdout.flush()  # while a reader that went away is still main's to meet
            raise
        raise Refusal(one_line(complaint.getvalue(), command)) from None


def shown(kind: type) -> list[str]:
    """The fields of a dataclass that are flags: those that are not kept from the command line."""
    from tyro.conf import Suppress

    hints = get_type_hints(kind, include_extras=True)
    return [field.name for field in fields(kind) if Suppress not in getattr(hints[field.name], "__metadata__", ())]


def given(argv: list[str], kind: type) -> set[str]:
    """The fields of a dataclass for which a command line has flags."""
    names = {found[1].replace("_", "-") for word in argv if (found := FLAG.match(word))}
    return {name for name in shown(kind) if flag(name) in names}


def listed(argv: list[str], name: str) -> list[str]:
    """The values of one flag that takes any number of them, read ahead of all others."""
    return _lists(argv, [name])[0][name]


def _lists(argv: list[str], names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of flags that take any number of them, gathered from each time they are given, and the other words."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        ahead.add_argument(f"--{name}", nargs="+", action="extend", default=[])
    try:
        found, rest = ahead.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise Refusal(f"{error.argument_name} is given no value; name one, or leave it out") from None
    for name, values in vars(found).items():
        if "" in values:
            raise Refusal(f"--{name} is given an empty value; name one, or leave it out")
    return vars(found), rest


def one_line(box: str, command: str) -> str:
    """tyro's complaint about a command, a box with a title and a helptext below a rule, as one sentence."""
    rows = [row.strip(" │|╭╮╰╯") for row in box.splitlines()][1:]
    body = " ".join(takewhile(lambda row: not _is_rule(row), dropwhile(_is_rule, rows)))
    text = re.sub(r"\s+", " ", body).strip().removesuffix(".")
    number = r"no type matching {None}\||could not convert string to |invalid literal for "
    if found := re.match(rf"Error parsing (\S+): (?:{number})(int|float).*?'(.*?)'", text, re.IGNORECASE):
        return f"{found[1]} {found[3]} is not {NUMBERS[found[2].lower()]}"
    if found := re.match(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*)\)", text):
        choices = found[3].replace("'", "").rstrip(",").split(", ")
        return f"{found[2]} {found[1]} is unknown{did_you_mean(found[1], choices)}; choose from {', '.join(choices)}"
    if found := re.match(r"Missing value for argument '(.*?)'. Expected (\d+) value", text):
        return f"{found[1]} takes {found[2]} value{'s' * (found[2] != '1')}"
    if found := re.match(r"Missing from .*?: [A-Z]+ (.*?)\.? \(required\)", text):
        return f"{command} needs {found[1][0].lower()}{found[1][1:]}, named before any flag"
    if found := re.match(r"Unrecognized options: ([^\s,]+)", text):
        return f"{command} cannot place {found[1]}; flags begin with --, and `fastlm {command} --help` lists them"
    return text.replace("Error parsing ", "")


def _is_rule(row: str) -> bool:
    return bool(row) and not row.strip("─-")

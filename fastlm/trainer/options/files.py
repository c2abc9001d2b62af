"""Flags from a file or a recipe: --config FILE or NAME, of which each name is a flag that the command line did not
give.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path

from fastlm.trainer.options.flags import given, shown
from fastlm.trainer.options.recipes import RECIPES
from fastlm.trainer.words import Refusal, absent, did_you_mean, flag

NAME = "--config"
OWN = ("out", "plugin")  # a file that came from somewhere else chooses neither where to write nor what code runs


def expanded(argv: list[str], kind: type, command: str) -> list[str]:
    """The command line with the flags of its --config FILE, if it has one, in that one's place.

    Args:
        argv: words.
        kind: the dataclass whose fields are flags.
        command: whose flags they are.

    Raises:
        Refusal: naming the file, for one that cannot be read, names that are no flags, and other than one file.
    """
    words = [word for old in argv for word in (old.split("=", 1) if old.startswith(NAME + "=") else [old])]
    if words.count(NAME) > 1 or words[-1:] == [NAME]:
        raise Refusal(f"{NAME} takes one file; name one")
    if NAME not in words:
        return argv
    at = words.index(NAME)
    path, rest = Path(words[at + 1]), words[:at] + words[at + 2 :]
    asked, visible = given(rest, kind), set(shown(kind))
    # what has no default is no flag, but a word of its own
    known = {x.name.rstrip("_"): x.name for x in fields(kind) if x.name in visible and x.default is not MISSING}
    flags: list[str] = []
    for name, value in _read(path, command, set(known)).items():
        field = known.get(name.replace("-", "_"))
        if field is None:
            raise Refusal(f"{path} names {name}, which is no flag of {command}{did_you_mean(name, known)}")
        if field in OWN:
            raise Refusal(f"{path} names {name}, which no file may choose; give {flag(name)} on the command line")
        if field not in asked:
            values = value if isinstance(value, list) else [value]
            flags += [flag(field), *map(str, values)] if values else []
    return rest[:at] + flags + rest[at:]


def _read(path: Path, command: str, known: set[str]) -> dict:
    """Name → value, those that are null left out; of a run.json, the run's that are flags."""
    if str(path) in RECIPES:
        if command != "pretrain":
            raise Refusal(f"{NAME} {path} is a recipe of `fastlm pretrain`; give a file of flags of `fastlm {command}`")
        return RECIPES[str(path)]
    if not path.is_file():
        near = did_you_mean(str(path), RECIPES)
        cure = f"give a .toml or .json file, a run.json, or a recipe: {', '.join(RECIPES)}"
        raise Refusal(f"{NAME} {absent(path, cure)}{near}")
    try:
        text = path.read_text(encoding="utf-8")
        values = _toml(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise Refusal(f"{path} cannot be read ({' '.join(str(error).split())}); give a .toml or .json file") from error
    if not isinstance(values, dict):
        raise Refusal(f"{path} holds no names; give an object of flags and their values")
    if isinstance(run := values.get("config"), dict):
        if run.get("command", command) != command:
            raise Refusal(f"{path} is a run of `fastlm {run['command']}`; give one of `fastlm {command}`")
        named = {name.rstrip("_"): value for name, value in run.items()}
        values = {name: value for name, value in named.items() if name in known - {*OWN}}
    return {name: value for name, value in values.items() if value is not None}


def _toml(text: str) -> dict:
    try:
        import tomllib
    except ImportError as error:
        raise Refusal("a .toml needs Python 3.11 or later; give a .json file") from error
    return tomllib.loads(text)

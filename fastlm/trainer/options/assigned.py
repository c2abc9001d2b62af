"""Options of what a flag names, such as a schedule's, from words of NAME=VALUE."""

import json
from collections.abc import Iterable, Mapping

from fastlm.trainer.words import Refusal, did_you_mean


def assigned(flag: str, words: Iterable[str], known: Mapping[str, object], of: str) -> dict[str, object]:
    """Name → value, a number or yes and no where the default is one.

    Args:
        flag: whose words they are.
        words: NAME=VALUE each.
        known: name → default.
        of: what has these options, in words.

    Raises:
        Refusal: naming the flag, for a word that is no NAME=VALUE, a name that is unknown, and another kind of value.
    """
    found: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise Refusal(f"{flag} {word} is no NAME=VALUE")
        if name not in known:
            there = f"; choose from {', '.join(known)}" if known else ", which has no options"
            raise Refusal(f"{flag} {name} is unknown of {of}{did_you_mean(name, known)}{there}")
        found[name] = _like(known[name], value, f"{flag} {name}")
    return found


def _like(default: object, value: str, named: str) -> object:
    """The value as the default's kind; of a default that is None, what JSON says it is."""
    if isinstance(default, str):
        return value
    try:
        read = json.loads(value)
    except ValueError:
        read = value
    if isinstance(default, float) and type(read) is int:
        return float(read)
    if default is not None and type(read) is not type(default):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        raise Refusal(f"{named} {value} is not {kinds.get(type(default), type(default).__name__)}")
    return read

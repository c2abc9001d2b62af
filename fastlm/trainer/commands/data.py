"""`fastlm data`: its commands by their names."""

from collections.abc import Callable
from importlib import import_module

HOMES = {"clean": "cleaning", "pack": "packing", "inspect": "inspecting"}  # imported when they are asked for


def command_of(name: str) -> Callable[..., None]:
    """A command, which takes its flags and what says lines."""
    return getattr(import_module(f"fastlm.trainer.commands.{HOMES[name]}"), name)

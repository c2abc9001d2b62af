"""`fastlm data`: its commands by their names."""

from collections.abc import Callable

from fastlm.trainer.commands.cleaning import clean
from fastlm.trainer.commands.inspecting import inspect
from fastlm.trainer.commands.packing import pack

COMMANDS: dict[str, Callable[..., None]] = {"clean": clean, "pack": pack, "inspect": inspect}

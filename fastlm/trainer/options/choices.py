"""The names that can be chosen: presets, positions, optimizers, objectives, schedules, experiments.

A registry is full once its room was imported, which takes torch's seconds, and a mistyped flag should not wait for
them. Until then the names are read off the room's sources, where each is a class's keyword or a key of the registry.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from fastlm.trainer import schedule  # noqa: F401 (a light one, always full)

PACKAGE = Path(__file__).parents[2]
REGISTRIES = {
    "preset": ("models.presets", "FAMILIES", "SIZED"),
    "position": ("positions", "SCHEMES"),
    "optimizer": ("optim", "OPTIMIZERS"),
    "objective": ("objectives", "OBJECTIVES"),
    "schedule": ("trainer.schedule", "SCHEDULES"),
    "kind": ("trainer.tasks", "TASKS"),
    "log": ("trainer.outputs.logs", "LOGS"),
    "experiment": ("trainer.reproduce", "EXPERIMENTS"),
}


def choices(flag: str) -> tuple[str, ...]:
    """The names that a flag takes; with a plugin's, once that was loaded."""
    home, *registries = REGISTRIES[flag]
    if module := sys.modules.get(f"fastlm.{home}"):
        return tuple(name for registry in registries for name in getattr(module, registry))
    path = PACKAGE.joinpath(*home.split("."))
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return tuple(name for file in files for name in _written(ast.parse(file.read_text(encoding="utf-8")), registries))


def _written(source: ast.Module, registries: list[str]) -> Iterator[str]:
    for node in source.body:
        if isinstance(node, ast.ClassDef):
            yield from (keyword.value.value for keyword in node.keywords if keyword.arg == "name")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and node.target.id in registries:
            yield from (key.value for key in node.value.keys)

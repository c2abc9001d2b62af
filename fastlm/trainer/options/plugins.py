"""A user's own positions, optimizers, objectives and schedules: modules that register them when they are imported.

`fastlm pretrain --plugin mine.py --position mine`. The run remembers their names, and who opens it gives them again: a
folder that came from somewhere else must not choose what code runs here.
"""

import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fastlm.trainer.words import Refusal


def load(names: Iterable[str]) -> None:
    """Import each plugin, a module's dotted name or the path of a .py file, once. Raises Refusal for one that is not
    there; what goes wrong inside it is its author's to see, and comes as it is.
    """
    for name in names:
        try:
            _load_file(Path(name).resolve()) if is_file(name) else importlib.import_module(name)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            cure = "give the path of a .py file, or a module that Python finds"
            raise Refusal(f"--plugin {name} cannot be imported ({error}); {cure}") from error


def hook(flag: str, name: str) -> Callable:
    """A user's function, MODULE:FUNCTION; the module as `load` takes one. Raises Refusal for one that is not there."""
    module, colon, function = name.rpartition(":")
    if not colon or not module:
        raise Refusal(f"{flag} {name} is no MODULE:FUNCTION; give such as mine.py:score")
    try:
        load((module,))
    except Refusal as error:
        raise Refusal(str(error).replace("--plugin", flag)) from error
    found = getattr(sys.modules[str(Path(module).resolve()) if is_file(module) else module], function, None)
    if not callable(found):
        raise Refusal(f"{flag} {name}: {module} has no function {function}")
    return found


def require(recorded: Iterable[str], imported: Iterable[str], folder: Path) -> None:
    """Raises Refusal if a run was made with plugins and none are imported now."""
    if recorded and not imported:
        asked = shlex.join(("--plugin", *recorded))
        raise Refusal(f"{folder} was made with {asked}; give it again if you trust that code")


def is_file(name: str) -> bool:
    return name.endswith(".py")


def _load_file(path: Path) -> None:
    name = str(path)  # a whole path hides no other module
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        # before it runs, as Python itself does: dataclasses look here
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])

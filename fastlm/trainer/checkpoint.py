"""Checkpoints that can be trusted: whole or not there, checked before use, and without pickle.

    state/step-1200/  model.safetensors  optimizer.safetensors  state.json  manifest.json
                      recurrence.safetensors    what a model remembers of the rows before, where it does
    state/start/      model.safetensors  manifest.json      what --pull draws weights back to, for the whole run

A checkpoint is written into a temporary folder, flushed to disk and renamed, so a kill at any moment leaves the last
one whole. The manifest holds every file's size and SHA-256; what does not match is refused, in words, and the one
before is used. The last two are kept.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from fastlm.interop.weights import tensor_file
from fastlm.models import Recurrence
from fastlm.trainer.data.tokens import sha256
from fastlm.trainer.disk import TEMPORARY, flush
from fastlm.trainer.words import Refusal

KEPT = 2
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "optimizer.safetensors", "state.json")
RECURRENCE = "recurrence.safetensors"
START = "start"


def save(
    state: Path,
    step: int,
    model: nn.Module,
    states: dict[int, dict[str, Tensor]],
    progress: dict,
    recurrences: Sequence[Recurrence] = (),
) -> None:
    """Write state/step-N. states: of the optimizer, by the parameter's number; progress: whatever JSON the caller needs
    to go on; recurrences: of each micro-batch. Weights that share memory are written once.
    """
    made, final = state / f"{TEMPORARY}{step}", state / f"step-{step}"
    if final.exists() and damage(final) is None:  # the same step gives the same bits
        return
    clear_temporary(state)
    made.mkdir(parents=True)
    try:
        _write(made, model, states, {"step": step, **progress}, recurrences)
    except OSError:  # a full disk has better use for the room
        clear_temporary(state)
        raise
    if final.exists():
        shutil.rmtree(final)
    made.rename(final)
    flush(state)
    for old in saved(state)[KEPT:]:
        # a half-deleted folder must not look like a checkpoint
        doomed = old.rename(state / f"{TEMPORARY}old-{old.name}")
        shutil.rmtree(doomed)


def _write(
    made: Path,
    model: nn.Module,
    states: dict[int, dict[str, Tensor]],
    progress: dict,
    recurrences: Sequence[Recurrence],
) -> None:
    with tensor_file(made / WEIGHTS) as file:
        save_model(model, str(file))
    with tensor_file(made / "optimizer.safetensors") as file:
        save_file(_joined(states), file)  # configuration and step make the groups
    (made / "state.json").write_text(json.dumps(progress))
    if recurrences:
        held = dict(enumerate(recurrence.state_dict() for recurrence in recurrences))
        with tensor_file(made / RECURRENCE) as file:
            save_file(_joined(held), file)
    _seal(made)


def _seal(made: Path) -> None:
    """Write the manifest, and have all of the folder on disk."""
    manifest = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(made.iterdir())}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*made.iterdir(), made):
        flush(path)


def save_start(state: Path, starts: dict[str, Tensor]) -> None:
    """Write state/start, once in a run."""
    made = state / f"{TEMPORARY}{START}"
    made.mkdir(parents=True)
    with tensor_file(made / WEIGHTS) as file:
        save_file({name: x.contiguous() for name, x in starts.items()}, file)
    _seal(made)
    made.rename(state / START)
    flush(state)


def start(state: Path) -> Iterator[tuple[str, Tensor]]:
    """What `save_start` was given, a tensor at a time. Raises Refusal if it is not whole."""
    fault = damage(state / START, (WEIGHTS,))
    if fault is not None:
        what = f"{state / START}, which --pull draws weights back to, is not whole ({fault})"
        raise Refusal(f"{what}; restore it, or start a new run")
    with safe_open(state / START / WEIGHTS, "pt") as file:
        yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (it is no mapping)


def newest(state: Path, refuse: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that matches its manifest, or None; `refuse` hears one line about each that does not."""
    for folder in saved(state):
        fault = damage(folder)
        if fault is None:
            return folder
        refuse(f"checkpoint {folder} is damaged ({fault}) and is not used")
    return None


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Load weights and optimizer state in place; return the saved progress and `step`."""
    load_model(model, str(folder / WEIGHTS))
    state = _apart(load_file(str(folder / "optimizer.safetensors")))
    optimizer.load_state_dict({"state": state, "param_groups": _groups(optimizer)})
    return json.loads((folder / "state.json").read_text())


def _groups(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Its groups as in a state dict, with parameters by their number."""
    numbers = count()
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in optimizer.param_groups]


def remembered(folder: Path, device: torch.device) -> list[dict[str, Tensor]]:
    """What each micro-batch's `Recurrence` held, in order; none where no model remembers."""
    path = folder / RECURRENCE
    held = _apart(load_file(str(path), str(device))) if path.exists() else {}
    return [held[i] for i in range(len(held))]


def saved(state: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(state.glob("step-*"), key=lambda p: -int(p.name.removeprefix("step-")))


def damage(folder: Path, files: Sequence[str] = FILES) -> str | None:
    """What is wrong with a checkpoint, or a folder of such files, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in sorted({*files, *manifest}):
            size, sha = manifest[name]
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            if sha256(folder / name) != sha:
                return f"{name} was altered"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read"
    except (ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be understood"
    return None


def clear_temporary(state: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for folder in state.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder)


def _joined(parts: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors as "index.name"."""
    return {f"{index}.{name}": value.contiguous() for index, values in parts.items() for name, value in values.items()}


def _apart(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The way back."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parts.setdefault(int(index), {})[name] = tensor
    return parts

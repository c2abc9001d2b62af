"""Weights in Hugging Face's format, and back."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastlm.interop.family import Family, TensorSlice
from fastlm.interop.gpt2 import GPT2
from fastlm.interop.llama import LLAMA
from fastlm.models import ModelConfig, Transformer


def _own_parts(model: Transformer) -> Iterator[TensorSlice]:
    for name in model.state_dict():
        if not (model.config.tie_embeddings and name == "head.weight"):
            yield TensorSlice(name, name)


FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "fastlm": Family(lambda config: True, lambda config: {}, _own_parts)}


def save_pretrained(model: Transformer, folder: Path | str, **entries) -> str:
    """Write a model in Hugging Face's format: config.json and model.safetensors, a tied matrix once.

    Args:
        model: the model to write.
        folder: where; made if it is not there.
        entries: more of config.json, such as eos_token_id and pad_token_id.

    Returns:
        The config's model_type, see `model_type`.

    Raises:
        OSError: for a folder that cannot be written, or a full disk.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = model_type(model.config)
    state = model.state_dict()
    tensors = {}
    for theirs, ours, rows, transposed in FAMILIES[kind].parts(model):
        part = state[ours][rows]
        tensors[theirs] = (part.T if transposed else part).contiguous().clone()
    with tensor_file(folder / "model.safetensors") as made:
        save_file(tensors, made, metadata={"format": "pt"})
    config = {
        "model_type": kind,
        "bos_token_id": None,
        "eos_token_id": None,
        **FAMILIES[kind].config(model.config),
        **entries,
    }
    config["fastlm"] = asdict(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return kind


@contextmanager
def tensor_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for safetensors to write to, moved there with the usual mode (safetensors' own is 0600).

    Raises OSError, as other files do, for a disk that is full.
    """
    from safetensors import SafetensorError

    made = path.with_name(f".tmp-{path.name}")
    try:
        made.touch()
        mode = made.stat().st_mode
        yield made
        made.chmod(mode)
        made.replace(path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    finally:
        made.unlink(missing_ok=True)


def load_pretrained(folder: Path | str) -> Transformer:
    """Load what `save_pretrained` wrote.

    Args:
        folder: a folder with config.json and model.safetensors.

    Returns:
        The Transformer, in evaluation mode, on the CPU.

    Raises:
        ValueError: for a folder that `save_pretrained` did not write, and for a tensor that is missing there.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json, so no model was saved there")
    config = json.loads((folder / "config.json").read_text())
    if "fastlm" not in config:
        raise ValueError(f"{folder / 'config.json'} was not written by fastlm: it has no 'fastlm' entry")
    model = Transformer(ModelConfig(**config["fastlm"]))
    saved = load_file(folder / "model.safetensors")
    pieces: dict[str, list[Tensor]] = {}
    for theirs, ours, _, transposed in FAMILIES[model_type(model.config)].parts(model):
        if theirs not in saved:
            raise ValueError(f"{folder / 'model.safetensors'} lacks {theirs!r}, which its config calls for")
        pieces.setdefault(ours, []).append(saved[theirs].T if transposed else saved[theirs])
    state = {ours: torch.cat(parts) for ours, parts in pieces.items()}
    if model.config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    return model.eval()


def model_type(config: ModelConfig) -> str:
    """The Hugging Face model that a config is saved as.

    Args:
        config: a model's shape.

    Returns:
        "llama", "gpt2", or "fastlm" where transformers has no such model.
    """
    return next(name for name, family in FAMILIES.items() if family.is_one(config))

"""Models from and to Hugging Face's format: config.json and model.safetensors."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.interop.families import FAMILIES
from fastlm.interop.family import Family
from fastlm.models import ModelConfig, Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = dict[str, Tensor]
GAMMA, BETA = (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")  # Google's names


def to_huggingface(model: Transformer, directory: Path | str, **entries: Any) -> str:
    """Write a model in Hugging Face's format: config.json and model.safetensors, tied matrices once.

        fastlm.interop.to_huggingface(model, "my-bert", pad_token_id=0)
        transformers.AutoModelForMaskedLM.from_pretrained("my-bert")

    Args:
        model: the model to write.
        directory: where; made if it is not there.
        entries: more of config.json, such as eos_token_id and pad_token_id.

    Returns:
        The config's model_type, see `model_type`. Where it is "fastlm", `from_huggingface` reads it, not transformers.
        It warns where transformers leaves a part of the model unread, as DeBERTa's mask decoder.

    Raises:
        OSError: for a folder that cannot be written, or a full disk.
        ValueError: for an entry that the model's shape has another value for.
    """
    directory, family = Path(directory), FAMILIES[model_type(model.config)]
    if unread := family.unread(model.config):
        warnings.warn(
            f"transformers does not compute {unread} of {directory}, which from_huggingface does", stacklevel=2
        )
    base = model.config.head == "none" and not model.config.pair_labels
    write(
        directory, family, family.entries(model.config), entries, tensors_of(family.alone() if base else family, model)
    )
    return family.model_type


def from_huggingface(source: "Path | str | PreTrainedModel") -> Transformer:
    """Open a model of Hugging Face's as a `Transformer`.

        model = fastlm.interop.from_huggingface("bert-base-uncased/")
        model = fastlm.interop.from_huggingface(transformers.AutoModel.from_pretrained(...))

    Args:
        source: a directory on this machine with config.json and model.safetensors, or the shards that
            model.safetensors.index.json names; or a model of transformers, whose weights are copied.

    Returns:
        The Transformer, in evaluation mode, with the weights' dtype and device. Its heads are those that the tensors
        show: a base model's config has head "none".

    Raises:
        ValueError: for a directory that holds no such model, a model_type that is none of FAMILIES, an option that we
            do not have, and a tensor that is missing, left over or of another shape. Nothing is ever unpickled.
    """
    return transformer(*opened(source))


def model_type(config: ModelConfig) -> str:
    """The Hugging Face model that a config is saved as.

    Args:
        config: a model's shape.

    Returns:
        The name of a family, such as "llama" or "bert"; "fastlm" where transformers has no such model.
    """
    return next(name for name, family in FAMILIES.items() if family.has(config))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def tensors_of(family: Family, model: Transformer) -> Tensors:
    """A model's weights under the family's names."""
    state = model.state_dict()
    return {part.theirs: part.of(state[part.ours]).contiguous().clone() for part in family.parts(model.config)}


def write(directory: Path, family: Family, config: dict, entries: dict, tensors: Tensors) -> None:
    """Write the files. config: the entries that the shape makes; entries: others, which must not contradict them."""
    from safetensors.torch import save_file

    for name in entries.keys() & config.keys():
        if entries[name] != config[name]:
            raise ValueError(
                f"{name} is {entries[name]!r}, and a {family.model_type} of this shape has {config[name]!r}"
            )
    directory.mkdir(parents=True, exist_ok=True)
    with tensor_file(directory / "model.safetensors") as made:
        save_file(tensors, made, metadata={"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {"bos_token_id": None, "eos_token_id": None, "torch_dtype": dtype} | config | entries
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def transformer(where: str, entries: dict, tensors: Tensors) -> Transformer:
    """The model of a config's entries and of tensors by name; where: what they are called."""
    kind = entries.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where} has model_type {kind!r}; fastlm knows {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    for pattern, name in family.renamed.items():
        tensors = {re.sub(pattern, name, other): tensor for other, tensor in tensors.items()}
    if not any(name.startswith(family.prefix) for name in tensors):
        family = family.alone()
    config = _as_tensors_show(family, family.config(entries), entries, tensors)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(_state(family, model, tensors, where), assign=True)
    if config.head == "lm" and config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(model.embedding.weight.device).eval()


def opened(source: "Path | str | PreTrainedModel") -> tuple[str, dict, Tensors]:
    """What the source is called, its config's entries, and its tensors by name."""
    if hasattr(source, "state_dict"):
        if not hasattr(getattr(source, "config", None), "to_dict"):
            raise ValueError(
                f"a {type(source).__name__} is no model of transformers, nor a directory; give one of them"
            )
        entries = source.config.to_dict() | {"architectures": [type(source).__name__]}
        return type(source).__name__, entries, dict(source.state_dict())
    from safetensors.torch import load_file

    if not isinstance(source, (str, Path)):
        raise ValueError(f"the source is a {type(source).__name__}; give a directory, or a model of transformers")
    folder = Path(source)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds no config.json, so no model was saved there; fastlm downloads nothing: give a directory "
            "of this machine, or a model that transformers loaded"
        )
    entries = json.loads((folder / "config.json").read_text())
    files = [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise ValueError(
                f"{folder} lacks {file.name}; fastlm reads safetensors and no pickles: "
                "load the model with transformers and call its save_pretrained"
            )
    tensors = (item for file in files for item in load_file(file).items())
    return str(folder), entries, {re.sub(*GAMMA, re.sub(*BETA, name)): tensor for name, tensor in tensors}


def _as_tensors_show(family: Family, config: ModelConfig, entries: dict, tensors: Tensors) -> ModelConfig:
    """The config with the heads that the tensors have, and a tied matrix only where there is no other one. Heads
    without a tensor of their own are as the entry "architectures" says.
    """
    if not family.architectures:
        return config
    parts = lambda changes: family.parts(replace(config, **changes))
    names = lambda ours, **changes: {part.theirs for part in parts(changes) if part.ours.startswith(ours)}
    heads, pairs = zip(*family.architectures, strict=True)
    said = {*(entries.get("architectures") or ())} & {*family.architectures.values()}
    untied = {head: names("head.", head=head, pair_labels=0, tie_embeddings=False) for head in dict.fromkeys(heads)}
    found = [head for head, own in untied.items() if own & tensors.keys()]
    if found:
        config = replace(config, head=found[0])
    elif not said and names("head.", pair_labels=0):
        config = replace(config, head="none")
    pair_head = names("pair_head.", head="none", pair_labels=max(pairs))
    if pair_head and pair_head <= tensors.keys():
        config = replace(config, pair_labels=max(pairs))
    elif not said:
        config = replace(config, pair_labels=0)
    if config.head == "lm" and config.tie_embeddings:
        (matrix,) = names("head.weight", tie_embeddings=False)
        embedding = tensors.get(family.copies[matrix])
        if matrix in tensors and embedding is not None and not torch.equal(tensors[matrix], embedding):
            config = replace(config, tie_embeddings=False)  # transformers 5 does not tie them either
    return replace(config, **family.shown(config, {*tensors}))


def _state(family: Family, model: Transformer, tensors: Tensors, where: str) -> Tensors:
    """Our state dict. model is on the meta device."""
    ours, parts, used = model.state_dict(), list(family.parts(model.config)), set()
    of_head = {part.theirs for part in parts if part.ours.startswith("head.")}
    copies = {copy: of for copy, of in family.copies.items() if copy not in of_head}
    pieces: dict[str, list[tuple[slice | Tensor, Tensor]]] = {}
    for part in parts:
        names = [part.theirs, *(copy for copy, of in copies.items() if of == part.theirs)]
        if part.ours != "head.weight":  # an untied matrix is no copy
            names.append(family.copies.get(part.theirs))
        name = next((name for name in names if name in tensors), None)
        if name is None:
            raise ValueError(f"{where} lacks {part.theirs!r}, which its config calls for")
        wanted = list(part.of(ours[part.ours]).shape)
        if list(tensors[name].shape) != wanted:
            raise ValueError(f"{where}: {name!r} is {list(tensors[name].shape)}, and its config calls for {wanted}")
        pieces.setdefault(part.ours, []).append((part.rows, part.back(tensors[name])))
        used.add(name)
    for copy, of in copies.items():
        if copy in tensors and of in tensors and not torch.equal(tensors[copy], tensors[of]):
            raise ValueError(f"{where}: {copy!r} differs from {of!r}, which it repeats in our {family.model_type}")
    _check_left_over(family, tensors.keys() - used - copies.keys(), where)
    state = {name: _joined(those, ours[name]) for name, those in pieces.items()}
    return {name: state["embedding.weight" if name not in state and name == "head.weight" else name] for name in ours}


def _check_left_over(family: Family, names: set[str], where: str) -> None:
    names = {name for name in names if not re.search(family.buffers, name)}
    poolers = {name for name in names if re.search(family.pooler, name)}
    if names - poolers:
        raise ValueError(
            f"{where} has {min(names - poolers)!r}, which no head of ours reads; try head_from_huggingface, or "
            "load the base model with transformers and give it to from_huggingface"
        )
    if poolers:
        warnings.warn(f"{', '.join(sorted(poolers))} of {where} are left out: no head reads them", stacklevel=4)


def _joined(pieces: list[tuple[slice | Tensor, Tensor]], like: Tensor) -> Tensor:
    """Rows of a parameter put together, in memory of its own."""
    dtype = reduce(torch.promote_types, (tensor.dtype for _, tensor in pieces))
    whole = torch.empty(like.shape, dtype=dtype, device=pieces[0][1].device)
    for rows, tensor in pieces:
        whole[rows] = tensor
    return whole


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

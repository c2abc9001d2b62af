"""What a family of Hugging Face's models is to us: when a model is one of it, its config.json, and its tensors."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastlm.models import ModelConfig, Transformer


class TensorSlice(NamedTuple):
    """One of their tensors is some rows of one of ours, transposed where theirs is stored [in, out]."""

    theirs: str
    ours: str
    rows: slice = slice(None)
    transposed: bool = False


class Family(NamedTuple):
    """is_one: whether a model of this config can be saved as the family. config: config.json's entries. parts: their
    tensors."""

    is_one: Callable[[ModelConfig], bool]
    config: Callable[[ModelConfig], dict]
    parts: Callable[[Transformer], Iterator[TensorSlice]]

"""What a family of Hugging Face's models is to us: when a model is one of it, its config.json, and its tensors."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastlm.models import ModelConfig, Transformer


class TensorSlice(NamedTuple):
    """One of their tensors is some rows of one of ours, transposed where theirs is stored [in, out].

    Args:
        theirs: the tensor's name in their files.
        ours: the parameter's name in our state dict.
        rows: of ours. Default all.
        transposed: whether theirs is the transpose. Default False.
    """

    theirs: str
    ours: str
    rows: slice = slice(None)
    transposed: bool = False


class Family(NamedTuple):
    """A family of Hugging Face's models.

    Args:
        is_one: whether a model of this config can be saved as the family.
        config: the entries of its config.json.
        parts: its tensors.
    """

    is_one: Callable[[ModelConfig], bool]
    config: Callable[[ModelConfig], dict]
    parts: Callable[[Transformer], Iterator[TensorSlice]]

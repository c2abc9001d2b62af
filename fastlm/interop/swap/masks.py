"""Which keys the queries of a pass see, in the terms of `fastlm.attention`, whatever a model hands its layers."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastlm import masks
from fastlm.interop.attention import Mask, on_device
from fastlm.interop.swap.served import Served
from fastlm.nn.torch_forms import mask_arguments


def mask(real: Tensor | None, Lq: int, Lk: int, *, offset: int | None = None, causal: bool = False) -> Mask:
    """What stands in place of a dense mask.

    Args:
        real: [B, keys] bool or int, which keys are no padding, from a row's first; keys that it does not tell of are
            padding. None for all.
        Lq: number of queries.
        Lk: number of keys.
        offset: position of the first query. None: Lk - Lq.
        causal: whether later keys are hidden.

    Returns:
        `Mask`, for `arguments`.
    """
    if real is not None:
        real = F.pad(real[:, :Lk], (0, max(0, Lk - real.shape[1])))
    seen = masks.padding(real, Lq)
    if offset is not None and offset != Lk - Lq:
        seen["offset"] = offset
    return Mask((Lq, Lk), causal=causal, **seen)


def arguments(seen: Mask | Tensor | None, query: Tensor, key: Tensor) -> dict[str, object]:
    """What of `fastlm.attention`'s arguments says what is seen.

    Args:
        seen: a Mask; a tensor that broadcasts to [B, H, Lq, keys], either bool, True for a visible key, or floats that
            are added to scores; None for no mask.
        query: [B, H, Lq, D].
        key: [B, Hk, Lk, D].

    Returns:
        A dict. A tensor becomes a bias, in its own shape, unless it says padding and can be read without waiting.

    Raises:
        ValueError: for a Mask of other lengths.
    """
    lengths = query.shape[2], key.shape[2]
    if seen is None:
        return {}
    if isinstance(seen, Mask):
        if seen.lengths != lengths:
            raise ValueError(f"a mask for {seen.lengths} queries and keys met {lengths}")
        return on_device(query.device, seen.seen)
    return mask_arguments(seen[..., : lengths[1]], query.shape[0], lengths[0])


def causal_mask(attention_mask: Tensor | None, inputs: Tensor, where: Tensor, cache: object) -> Mask | Tensor:
    """The causal mask of inputs [B, Lq, dim] at the positions where [Lq] int, and of a cache's keys; a mask of 4
    dimensions is what it is. For models that make their masks themselves, as before transformers 5.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    Lq, offset = inputs.shape[1], int(where[0])
    Lk = cache.get_max_cache_shape() if cache is not None and cache.is_compileable else offset + Lq
    return mask(attention_mask, Lq, Lk, offset=offset, causal=True)


class MaskedStack(Served):
    """A stack of layers that asks transformers for one mask for all of them: the interface for attention from
    transformers 5 on, before it by a method of its own.

    Attributes:
        seldom: what may be asked for, of the call or of the config, and is not served.
    """

    how = "masks that are not dense"
    by_interface = True
    seldom: ClassVar[tuple[str, ...]] = ()

    def forward(self, *args, **kwargs):
        self.refuse(vars(self.config) | kwargs, *self.seldom)
        return super().forward(*args, **kwargs)

    def _update_causal_mask(self, attention_mask, input_tensor, cache_position, past_key_values, *args):
        return causal_mask(attention_mask, input_tensor, cache_position, past_key_values)


@functools.cache
def in_other_words(function: Callable, **names: Callable) -> Callable:
    """The same function, in which these names of its module mean something else."""
    function = inspect.unwrap(function)
    there = function.__globals__ | names
    made = types.FunctionType(function.__code__, there, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@functools.cache
def before_5() -> bool:
    """Whether transformers is older than 5, in which many models made their masks themselves; no if there is none."""
    try:
        import transformers
    except ImportError:
        return False
    return int(transformers.__version__.split(".")[0]) < 5


def offset_of(seen: dict[str, object], Lq: int, Lk: int) -> int:
    """Where the first query stands among the keys under such arguments."""
    return seen.get("offset", Lk - Lq)


def heads(x: Tensor, D: int) -> Tensor:
    """[B, L, H · D] → [B, H, L, D]."""
    return x.unflatten(-1, (-1, D)).transpose(1, 2)

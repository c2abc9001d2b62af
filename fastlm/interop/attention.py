"""fastlm's attention in transformers' models, through transformers' own interfaces for attention and masks.

transformers makes a mask once for a pass through a model, and each layer hands it to attention. Where theirs is an L×L
tensor, ours is a `Mask`: the arguments of `fastlm.attention` that say the same. Between the two stands the model's own
code, and not all of it keeps to this way:

    BLOOM, MPT, CodeGen     ask for a mask and compute attention themselves; handed None, they would see the future
    DeBERTa, XLNet          ask for nothing, and would run as they always do, under our name

Both are refused by name when they are made; and whoever computes with a Mask is told so in a sentence. What a model
computes itself under every implementation, as LongT5 its local attention, stays its own.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import masks
from fastlm.interop.mask_functions import read
from fastlm.nn.functional import attention
from fastlm.nn.torch_forms import of_one_width

NAME = "fastlm"  # attn_implementation=...
UNSERVED = (  # what some models ask of attention by a keyword
    "sinks", "indices", "block_indices", "head_mask", "cache", "output_attentions",
)  # fmt: skip
MISUSED = "cannot serve this model, which computes with its mask itself and not by transformers' attention interface"


@functools.cache  # a second call would wrap their methods twice
def register() -> None:
    """Make attn_implementation="fastlm" known to transformers, 4.57 and later; a second call does nothing.

    Served are causal and bidirectional attention, sliding windows and chunks, padding anywhere, packed rows (by
    position_ids that start over), grouped heads, values of another width, capped scores, attention sinks, dropout, T5's
    position bias, and every cache; a static one under torch.compile is not. Before transformers 5 its encoders made
    their masks themselves and are refused.

        fastlm.interop.register()
        model = AutoModel.from_pretrained(name, attn_implementation="fastlm")

    Returns:
        None; transformers' registries have it from then on.

    Raises, later, from transformers' own calls:
        NotImplementedError: for everything that is not served. For a model that computes attention itself, when it is
            loaded or given this implementation; otherwise when it runs.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    for name in ("get_correct_attn_implementation", "set_attn_implementation"):  # every new model calls the first
        setattr(PreTrainedModel, name, _refusing(getattr(PreTrainedModel, name)))


# ---------------------------------------------------------------------------------------------------------------------
# Once for a pass


class Mask:
    """Which keys the queries of a pass see, for `_attention` to read; every other use raises, in words.

    lengths: (Lq, Lk). seen: the arguments of `fastlm.attention` that say it.
    """

    ndim = 4  # as that of a dense mask; `generate` makes a mask before the model does, and asks

    def __init__(self, lengths: tuple[int, int], **seen):
        self.lengths, self.seen = lengths, seen

    def contiguous(self) -> "Mask":
        return self

    def _refuse(self, *args, **kwargs) -> NoReturn:
        raise _refusal(MISUSED)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(str(_refusal(MISUSED)))  # hasattr then answers no

    __torch_function__ = classmethod(_refuse)  # whatever function of torch is handed one
    __bool__ = __len__ = __iter__ = __getitem__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __invert__ = __neg__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse


def _mask(
    batch_size, kv_length, q_length=None, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
    cache_position=None, device=None, **kwargs,
) -> Mask:  # fmt: skip
    """transformers' mask call. attention_mask [B, keys] bool: which keys are no padding, from a row's first. q_offset,
    kv_offset: positions of the first query and of the first key; a static cache's q_offset is a tensor. cache_position
    [Lq] int: where queries stand, which older versions give for q_length and q_offset.
    """
    if isinstance(attention_mask, Mask):  # that `generate` made
        return attention_mask
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling():
            raise _refusal("needs to know where queries stand, and a static cache that is compiled does not say")
        q_offset = int(q_offset)
    place = lambda start, n: torch.arange(start, start + n, device=device)[None]
    seen = read(mask_function, lambda: (place(q_offset, q_length), place(kv_offset, kv_length)))
    if seen is None:
        raise _refusal(f"serves no mask made by {mask_function.__module__}.{mask_function.__qualname__}")
    offset = q_offset - kv_offset
    last = kv_length if seen.right is None else min(kv_length, offset + q_length + seen.right)  # keys that are seen
    if attention_mask is not None:
        if attention_mask.shape[0] != batch_size or attention_mask.shape[1] < kv_offset + last:
            raise ValueError(
                f"attention_mask must tell of all keys, those in the cache too: [{batch_size}, {kv_offset + last}]; "
                f"got {list(attention_mask.shape)}"
            )
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        attention_mask = F.pad(attention_mask, (0, kv_length - attention_mask.shape[1]))
    if seen.segments is None:
        hidden = masks.padding(attention_mask, q_length)
    else:
        of_queries, of_keys = (x.expand(batch_size, -1) for x in seen.segments)
        apart = of_keys if attention_mask is None else masks.padding_apart(of_keys, attention_mask)
        hidden = {"segments": (of_queries, apart)}
    if offset != kv_length - q_length:
        hidden["offset"] = offset
    return Mask((q_length, kv_length), window=(seen.left, seen.right), **hidden)


# ---------------------------------------------------------------------------------------------------------------------
# In each layer


def _attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, softcap=None, s_aux=None,
    **kwargs,
):  # fmt: skip
    """transformers' attention call: query [B, H, Lq, D], key [B, Hk, Lk, D], value [B, Hk, Lk, Dv] → ([B, Lq, H, Dv],
    no weights). s_aux: [H], a sink's score beside those of the keys.
    """
    for name in UNSERVED:
        asked = kwargs.get(name)
        if asked is not None and asked is not False:
            raise _refusal(f"does not serve {name} yet")
    mask, lengths = attention_mask, (query.shape[2], key.shape[2])
    if mask is None:  # the model made none, so that, as in their own functions, the layer says what it sees
        if kwargs.get("sliding_window") is not None:
            raise _refusal(f"was given no mask for sliding_window, {kwargs['sliding_window']}")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = Mask(lengths, causal=causal)
    if not isinstance(mask, Mask):
        raise _refusal(f"takes no dense mask; got one of shape {list(mask.shape)}")
    if mask.lengths != lengths:
        raise _refusal(f"was given a mask for {mask.lengths} queries and keys; {type(module).__name__} has {lengths}")
    seen = on_device(query.device, mask.seen)
    bias = kwargs.get("position_bias")  # T5's, which its model made dense
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key, value, width = of_one_width(query, key, value)
    sinks = s_aux is not None
    out = attention(
        query, key, value, bias=bias, dropout=dropout, scale=scale, softcap=softcap, return_lse=sinks, **seen
    )  # fmt: skip
    if sinks:  # a sink takes its share of the probabilities and gives nothing
        out, lse = out
        out = out * (lse - s_aux[:, None]).sigmoid()[..., None].to(out.dtype)
    return out[..., :width].transpose(1, 2).contiguous(), None


def on_device(device: torch.device, seen: dict[str, object]) -> dict[str, object]:
    """Arguments of `fastlm.attention` there, for layers may stand on several devices."""
    return {name: _to(device, x) for name, x in seen.items()}


def _to(device: torch.device, x: object) -> object:
    if isinstance(x, tuple):
        return tuple(_to(device, part) for part in x)
    return x.to(device) if isinstance(x, Tensor) else x


# ---------------------------------------------------------------------------------------------------------------------
# Models that never call


def _refusing(method: Callable) -> Callable:
    """A method of PreTrainedModel that is told an implementation, refusing ours where it would never be called:
    transformers itself asks nobody, or warns and goes on.
    """

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        if NAME in (*args, *kwargs.values()) and _attends_by_itself(type(self)):
            raise _refusal(
                f"cannot serve {type(self).__name__}, which computes attention itself and not by transformers' "
                "attention interface"
            )
        return method(self, *args, **kwargs)

    return checked


@functools.cache
def _attends_by_itself(model: type) -> bool:
    """Whether the source of a model, or of one it extends, has classes of attention and no call of the interface, or a
    class for each implementation that transformers brings. Source that cannot be read, as in a notebook, has neither.

    PreTrainedModel._can_set_attn_implementation judges by the same signs.
    """
    from transformers import PreTrainedModel

    for base in model.__mro__[: model.__mro__.index(PreTrainedModel)]:
        try:
            source = inspect.getsource(sys.modules[base.__module__])
        except (KeyError, OSError, TypeError):
            continue
        attends = re.search(r"^class \w*Attention\w*\(nn\.Module", source, re.MULTILINE)
        calls = re.search(r"ALL_ATTENTION_FUNCTIONS(\[|\.get_interface\()", source)
        if (attends and not calls) or "ATTENTION_CLASSES[" in source:
            return True
    return False


def _refusal(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_implementation={NAME!r} {what}; load the model with attn_implementation='sdpa' or 'eager'"
    )

"""fastlm's attention in transformers' models, through transformers' own interfaces for attention and masks.

transformers makes a mask once for a pass through a model, and each layer hands it to attention. Where theirs is an L×L
tensor, ours is a `Mask`: a few facts that `_attention` turns into arguments of `fastlm.attention`. Between the two
stands the model's own code, and not all of it keeps to this way:

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
from torch import Tensor

from fastlm import masks
from fastlm.nn.functional import attention

NAME = "fastlm"  # attn_implementation=...
UNSERVED = (  # what some models ask of attention by a keyword
    "softcap", "sliding_window", "s_aux", "sinks", "indices", "block_indices",
    "head_mask", "cache", "output_attentions",
)  # fmt: skip
MISUSED = "cannot serve this model, which computes with its mask itself and not by transformers' attention interface"


@functools.cache  # a second call would wrap their methods twice
def register() -> None:
    """Make attn_implementation="fastlm" known to transformers, 4.57 and later; a second call does nothing.

    Served are causal and bidirectional attention, grouped heads, dropout, T5's position bias, padding on any side, and
    caches that grow.

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

    lengths: (Lq, Lk). padding: the arguments of `fastlm.attention` that hide it.
    """

    def __init__(self, lengths: tuple[int, int], causal: bool, padding: dict[str, Tensor | tuple[Tensor, Tensor]]):
        self.lengths, self.causal, self.padding = lengths, causal, padding

    def _refuse(self, *args, **kwargs) -> NoReturn:
        raise _refusal(MISUSED)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(str(_refusal(MISUSED)))  # hasattr then answers no

    __torch_function__ = classmethod(_refuse)  # whatever function of torch is handed one
    __bool__ = __len__ = __iter__ = __getitem__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __invert__ = __neg__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse


def _mask(
    batch_size, kv_length, q_length=None, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
    cache_position=None, **kwargs,
) -> Mask:  # fmt: skip
    """transformers' mask call. attention_mask [B, Lk] bool: which keys are no padding. cache_position [Lq] int: where
    queries stand, which older versions give for q_length and q_offset.
    """
    from transformers import masking_utils

    if cache_position is not None:
        q_length, q_offset = len(cache_position), int(cache_position[0])
    causal = mask_function is masking_utils.causal_mask_function
    if not causal and mask_function is not getattr(masking_utils, "bidirectional_mask_function", None):
        raise _refusal("serves causal and bidirectional masks, no windows and no packed rows")
    if causal and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise NotImplementedError(
            f"attn_implementation={NAME!r} serves caches that grow; use the dynamic cache instead of a static one"
        )
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask must tell of all keys, those in the cache too: [{batch_size}, {kv_length}]; "
            f"got {list(attention_mask.shape)}"
        )
    return Mask((q_length, kv_length), causal, masks.padding(attention_mask, q_length))


# ---------------------------------------------------------------------------------------------------------------------
# In each layer


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """transformers' attention call: query [B, H, Lq, D], key, value [B, Hk, Lk, D] → ([B, Lq, H, D], no weights)."""
    for name in UNSERVED:
        asked = kwargs.get(name)
        if asked is not None and asked is not False:
            raise _refusal(f"does not serve {name} yet")
    mask, lengths = attention_mask, (query.shape[2], key.shape[2])
    if mask is None:  # the model made none, so that, as in their own functions, the layer says what it sees
        mask = Mask(lengths, getattr(module, "is_causal", True) if is_causal is None else is_causal, {})
    if not isinstance(mask, Mask):
        raise _refusal(f"takes no dense mask; got one of shape {list(mask.shape)}")
    if mask.lengths != lengths:
        raise _refusal(f"was given a mask for {mask.lengths} queries and keys; {type(module).__name__} has {lengths}")
    bias = kwargs.get("position_bias")  # T5's, which its model made dense
    padding = {name: _to(query.device, x) for name, x in mask.padding.items()}  # layers may stand on several devices
    out = attention(query, key, value, bias=bias, causal=mask.causal, dropout=dropout, scale=scaling, **padding)
    return out.transpose(1, 2).contiguous(), None


def _to(device: torch.device, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return x.to(device) if isinstance(x, Tensor) else tuple(part.to(device) for part in x)


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

"""MPT: ALiBi as a table over distance."""

import copy

from torch import Tensor

from fastlm.interop.attention import NAME, Mask
from fastlm.interop.swap.bloom import SELDOM, alibi_terms
from fastlm.interop.swap.masks import arguments, before_5, heads, in_other_words, mask
from fastlm.interop.swap.served import Served
from fastlm.nn.functional import attention


class MptAttention(Served):
    names = ("transformers.models.mpt.modeling_mpt.MptAttention",)
    how = "fastlm.attention with ALiBi as a table over distance"

    def forward(self, hidden_states, position_bias, past_key_values=None, attention_mask=None, **asked):
        self.refuse(asked, *SELDOM)
        made = self.Wqkv(hidden_states)
        made = made.clamp(-self.clip_qkv, self.clip_qkv) if self.clip_qkv else made
        query, key, value = (heads(x, self.head_dim) for x in made.chunk(3, 2))
        if past_key_values is not None:
            where = asked.get("cache_position")
            more = () if where is None else ({"cache_position": where},)
            key, value = past_key_values.update(key, value, self.layer_idx, *more)
        if isinstance(attention_mask, Tensor):
            attention_mask = ~attention_mask  # True for hidden keys here
        seen = arguments(attention_mask, query, key)
        if position_bias is not None:  # its last two keys are a step apart
            slopes = (position_bias[:, 0, -1:] - position_bias[:, 0, -2:-1])[:, 0]
            seen["position"] = alibi_terms(slopes, query.shape[2], key.shape[2], seen, query)
        dropout = self.attn_dropout_p if self.training else 0.0
        out = attention(query, key, value, scale=self.softmax_scale, dropout=dropout, **seen)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class MptModel(Served):
    names = ("transformers.models.mpt.modeling_mpt.MptModel",)
    parts = (MptAttention,)
    how = "masks that are not dense"

    def forward(self, *args, **kwargs):
        self.refuse(vars(self.config) | kwargs, *SELDOM)
        maker = {"_prepare_4d_causal_attention_mask": _before_5} if before_5() else {"create_causal_mask": _since_5}
        return in_other_words(self.original.forward, **maker)(self, *args, **kwargs)


class Bool:
    """A mask that this model asks for as bool, before it hands it on."""

    def __init__(self, made: Mask | Tensor):
        self.made = made

    def to(self, dtype) -> Mask | Tensor:
        return self.made.to(dtype) if isinstance(self.made, Tensor) else self.made

    def bool(self) -> Mask | Tensor:
        return self.to(bool)


def _since_5(config, **inputs) -> Bool:
    from transformers.masking_utils import create_causal_mask

    config = copy.copy(config)
    config._attn_implementation_internal = NAME
    return Bool(create_causal_mask(config=config, **inputs))


def _before_5(attention_mask: Tensor, shape: tuple[int, int], inputs: Tensor, past: int) -> Bool:
    L = shape[1]
    return Bool(mask(attention_mask, L, past + L, causal=True))

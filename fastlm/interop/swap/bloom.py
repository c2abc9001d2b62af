"""BLOOM: ALiBi as a table over distance."""

import torch
from torch import Tensor

from fastlm.interop.swap.masks import MaskedStack, arguments, offset_of
from fastlm.interop.swap.served import Served
from fastlm.nn.functional import attention
from fastlm.positions import ALiBi, Terms

SELDOM = ("output_attentions", "head_mask")
ALONG_THE_ROW = {"causal", "window", "offset", "key_lengths"}  # masks under which keys count from the row's start


def alibi_terms(slopes: Tensor, Lq: int, Lk: int, seen: dict, query: Tensor) -> Terms:
    """slope · (key minus query position) of slopes [H], for a call with these arguments of `fastlm.attention`: for keys
    after the query not ALiBi's -slope · |distance|, but what is a constant a query beside a number a key.
    """
    offset, wide = offset_of(seen, Lq, Lk), torch.promote_types(query.dtype, torch.float32)
    distance = torch.arange(-(Lq - 1) - offset, Lk - offset, device=query.device)
    return Terms(table=slopes.to(query.device, wide)[:, None] * distance, size=(Lq, Lk, offset))


class BloomAttention(Served):
    names = ("transformers.models.bloom.modeling_bloom.BloomAttention",)
    how = "fastlm.attention with ALiBi as a table over distance"

    @classmethod
    def refusal(cls, module) -> str | None:
        return "slow_but_exact is asked for" if module.pretraining_tp > 1 and module.slow_but_exact else None

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **asked):
        self.refuse(asked, *SELDOM)
        if isinstance(attention_mask, Tensor):
            self.refuse_to("take a mask of each pair")
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            where = asked.get("cache_position")
            more = () if where is None else ({"cache_position": where},)
            key, value = layer_past.update(key, value, self.layer_idx, *more)
        seen = arguments(attention_mask, query, key)
        B, H, Lq, _ = query.shape
        if seen.keys() <= ALONG_THE_ROW:
            seen["position"] = alibi_terms(ALiBi(H).slopes, Lq, key.shape[2], seen, query)
        else:  # keys are counted without padding, which may stand among them: a number a key, as BLOOM itself has it
            seen["bias"] = alibi.reshape(B, H, 1, -1)
        dropout = self.attention_dropout.p if self.training else 0.0
        out = attention(query, key, value, scale=self.inv_norm_factor, dropout=dropout, **seen)
        out = self.dense(out.transpose(1, 2).flatten(2))
        return residual + torch.nn.functional.dropout(out, self.hidden_dropout, self.training), None


class BloomModel(MaskedStack):
    names = ("transformers.models.bloom.modeling_bloom.BloomModel",)
    parts = (BloomAttention,)
    seldom = SELDOM

"""T5, mT5 and UMT5: the bias of a bucket of distances, as a table over distance instead of a tensor for each pair."""

import torch
from torch import Tensor

from fastlm.interop.swap.masks import MaskedStack, arguments, before_5, heads, offset_of
from fastlm.interop.swap.served import Served
from fastlm.nn.functional import attention
from fastlm.positions import Terms

SELDOM = ("output_attentions", "layer_head_mask", "head_mask", "cross_attn_head_mask")


class Table:
    """Whose relative_attention_bias it is that layers share. They are handed this where transformers hands the bias of
    each pair; each makes its own terms, for under reentrant checkpoints tensors that are made there have no gradient.
    """

    def __init__(self, owner: "UMT5Attention"):
        self.owner = owner

    def terms(self, Lq: int, Lk: int, offset: int, query: Tensor) -> Terms:
        a = self.owner
        distance = torch.arange(-(Lq - 1) - offset, Lk - offset, device=a.relative_attention_bias.weight.device)
        table = a.relative_attention_bias(a.buckets(distance)).T
        table = table.to(query.device, torch.promote_types(query.dtype, torch.float32))
        return Terms(table=table, size=(Lq, Lk, offset))


class UMT5Attention(Served):
    """Every self-attention has a table of its own."""

    names = ("transformers.models.umt5.modeling_umt5.UMT5Attention",)
    how = "fastlm.attention with T5's bias as a table over distance"

    @classmethod
    def refusal(cls, module) -> str | None:
        return "its heads were pruned" if getattr(module, "pruned_heads", None) else None

    def forward(
        self, hidden_states, encoder_hidden_states=None, past_key_values=None, attention_mask=None, **asked
    ) -> tuple[Tensor, None]:
        own = Table(self) if self.has_relative_attention_bias else None
        return self.attend(hidden_states, encoder_hidden_states, past_key_values, attention_mask, own, asked), None

    def attend(self, x, memory, cache, seen, table: Table | None, asked: dict) -> Tensor:
        """Attention of x [B, Lq, dim] to itself and the cache, or to memory [B, Lk, dim] → [B, Lq, dim]."""
        self.refuse(asked, *SELDOM)
        query = heads(self.q(x), self.key_value_proj_dim)
        key, value, past = self.keys(x, memory, cache, asked.get("cache_position"))
        Lq, Lk = query.shape[2], key.shape[2]
        seen = {"offset": past} | arguments(seen, query, key) if memory is None else arguments(seen, query, key)
        dropout = self.dropout if self.training else 0.0
        position = None if table is None else table.terms(Lq, Lk, offset_of(seen, Lq, Lk), query)
        out = attention(query, key, value, position=position, scale=1.0, dropout=dropout, **seen)
        return self.o(out.transpose(1, 2).flatten(2))

    def keys(self, x, memory, cache, where) -> tuple[Tensor, Tensor, int]:
        """Keys and values [B, H, Lk, D], with those of the cache, which takes x's; and how many it had."""
        crossing, layer = memory is not None, self.layer_idx
        two = hasattr(cache, "self_attention_cache")  # a cache for itself and one for what it reads
        own = (cache.cross_attention_cache if crossing else cache.self_attention_cache) if two else cache
        if crossing and two and cache.is_updated.get(layer):
            return own.layers[layer].keys, own.layers[layer].values, 0
        past = 0 if own is None or crossing else int(own.get_seq_length(layer) if where is None else where[0])
        read = memory if crossing else x
        key, value = (heads(project(read), self.key_value_proj_dim) for project in (self.k, self.v))
        if own is not None:
            more = () if where is None else ({"cache_position": None if crossing else where},)
            key, value = own.update(key, value, layer, *more)
            if crossing and two:
                cache.is_updated[layer] = True
        return key, value, past

    def buckets(self, distance: Tensor) -> Tensor:
        """[n] int64, key minus query position → [n], by the model's own rule."""
        return self._relative_position_bucket(distance)


class T5Attention(UMT5Attention):
    """The first layer's table is every layer's."""

    names = (
        "transformers.models.t5.modeling_t5.T5Attention",
        "transformers.models.mt5.modeling_mt5.MT5Attention",
    )

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **asked
    ):
        if not isinstance(position_bias, (Table, type(None))):
            self.refuse_to("take a position_bias of each pair")
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = Table(self)
        out = self.attend(hidden_states, key_value_states, past_key_values, mask, position_bias, asked)
        return (out, position_bias) if before_5() else (out, position_bias, None)

    def buckets(self, distance: Tensor) -> Tensor:
        return self._relative_position_bucket(
            distance, not self.is_decoder, self.relative_attention_num_buckets, self.relative_attention_max_distance
        )


class Stack(MaskedStack):
    """An encoder or a decoder, whose masks are not dense."""

    names = (
        "transformers.models.t5.modeling_t5.T5Stack",
        "transformers.models.mt5.modeling_mt5.MT5Stack",
        "transformers.models.umt5.modeling_umt5.UMT5Stack",
    )
    parts = (UMT5Attention, T5Attention)
    seldom = SELDOM

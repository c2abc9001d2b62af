"""XLNet: Transformer-XL's rows by distance, relative segments, and two streams."""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import masks
from fastlm.interop.swap.served import Served
from fastlm.nn.functional import attention
from fastlm.positions import Terms, Vectors

SELDOM = ("output_attentions", "head_mask")


class Seen(NamedTuple):
    """What a stream's queries see: handed to layers where transformers hands a mask of each pair.

    Args:
        causal: whether later tokens are hidden.
        left: how many keys before its own a query sees; None for all.
        hidden: arguments of `fastlm.attention` that hide padding, or what perm_mask does.
    """

    causal: bool
    left: int | None
    hidden: dict


class Groups(NamedTuple):
    """Segments of queries [B, L] and of keys [B, Lk], int: handed where transformers hands one number a pair."""

    of_queries: Tensor
    of_keys: Tensor


class RelativeAttention(Served):
    names = ("transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention",)
    how = "fastlm.attention with Transformer-XL's rows by distance"

    def forward(
        self, h, g, attn_mask_h, attn_mask_g, r, seg_mat, mems=None, target_mapping=None, head_mask=None,
        output_attentions=False,
    ):  # fmt: skip
        """h [L, B, dim], g [P, B, dim] or None, mems [M, B, dim] or None, target_mapping [P, L, B] or None."""
        self.refuse({"output_attentions": output_attentions, "head_mask": head_mask}, *SELDOM)
        read = h if mems is None or mems.ndim < 2 else torch.cat([mems, h])
        key, value = self.heads(read, self.k), self.heads(read, self.v)
        L, Lk = len(h), len(read)
        rows = torch.einsum("nh,hkd->knd", r[:, 0].to(self.r.dtype), self.r)
        vectors = Vectors(query_vectors=rows, content_bias=self.r_w_bias, position_bias=self.r_r_bias)
        position = Terms(vectors=vectors, size=(L, Lk, Lk - L))
        stream = lambda query, seen: self.attend(query, key, value, position, seg_mat, seen)
        out_h = self.post_attention(h, stream(self.heads(h, self.q), attn_mask_h))
        if g is None:
            return out_h, None
        query = self.heads(g, self.q)
        if target_mapping is None:
            return out_h, self.post_attention(g, stream(query, attn_mask_g))
        query = torch.einsum("bnmd,mlb->bnld", query, target_mapping)
        vector = torch.einsum("lbnd,mlb->mbnd", stream(query, attn_mask_g), target_mapping)
        return out_h, self.post_attention(g, vector)

    @staticmethod
    def heads(x: Tensor, weight: Tensor) -> Tensor:
        """[L, B, dim] → [B, H, L, D]."""
        return torch.einsum("ibh,hnd->bnid", x, weight)

    def attend(self, query, key, value, position: Terms, groups: Groups | None, seen: Seen) -> Tensor:
        """[B, H, L, D] → [L, B, H, D]."""
        given = dict(seen.hidden)
        if groups is not None:
            same = (query + self.r_s_bias[:, None]) * (self.seg_embed[0] - self.seg_embed[1])[:, None]
            given["group_bias"] = (self.scale * same.sum(-1), *groups)
        dropout = self.dropout.p if self.training else 0.0
        return attention(
            query, key, value, position=position, scale=self.scale, dropout=dropout, causal=seen.causal,
            window=None if seen.left is None else (seen.left, None), **given,
        ).permute(2, 0, 1, 3)  # fmt: skip


class Model(Served):
    """What its layers are handed is made here, and transformers has no place to change less than all of forward."""

    names = ("transformers.models.xlnet.modeling_xlnet.XLNetModel",)
    parts = (RelativeAttention,)
    how = "masks, segments and distances that are not dense"

    @classmethod
    def refusal(cls, module) -> str | None:
        return "bi_data is asked for" if module.bi_data else None

    def forward(
        self, input_ids=None, attention_mask=None, mems=None, perm_mask=None, target_mapping=None,
        token_type_ids=None, input_mask=None, head_mask=None, inputs_embeds=None, use_mems=None,
        output_attentions=None, output_hidden_states=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        self.refuse(vars(self.config) | {"output_attentions": output_attentions, "head_mask": head_mask}, *SELDOM)
        own = lambda value, name: getattr(self.config, name) if value is None else value
        if use_mems is None and "use_cache" in kwargs:
            use_mems = kwargs["use_cache"]
        use_mems = own(use_mems, "use_mems_train" if self.training else "use_mems_eval")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and input_mask is not None:
            raise ValueError("give either attention_mask, 1 for tokens, or input_mask, 1 for padding")
        x = self.word_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        real = attention_mask if input_mask is None else 1 - input_mask
        B, L = x.shape[:2]
        M = 0 if mems is None or mems[0] is None else len(mems[0])
        content, queries = self.seen(L, M, real, perm_mask, use_mems)
        groups = None
        if token_type_ids is not None:
            groups = Groups(token_type_ids, F.pad(token_type_ids, (M, 0)))
        h, g = self.dropout(x.transpose(0, 1)), None
        if target_mapping is not None:
            target_mapping = target_mapping.permute(1, 2, 0)
            g = self.dropout(self.mask_emb.expand(len(target_mapping), B, -1))
        given = dict(
            attn_mask_h=content, attn_mask_g=queries, r=self.rows(L, M + L, h), seg_mat=groups,
            target_mapping=target_mapping,
        )  # fmt: skip
        kept, states = [], []
        for layer, memory in zip(self.layer, [None] * len(self.layer) if mems is None else mems, strict=True):
            kept += [self.cache_mem(h, memory)] if use_mems else []
            states += [h] if g is None else [h, g]
            h, g = layer(h, g, mems=memory, **given)[:2]
        states += [h] if g is None else [h, g]
        output = {
            "last_hidden_state": self.dropout(h if g is None else g).transpose(0, 1).contiguous(),
            "mems": tuple(kept) if use_mems else None,
        }
        if own(output_hidden_states, "output_hidden_states"):
            output["hidden_states"] = tuple(x.transpose(0, 1).contiguous() for x in states)
        if own(return_dict, "return_dict"):
            return sys.modules[self.original.__module__].XLNetModelOutput(**output)
        return tuple(x for x in output.values() if x is not None)

    def rows(self, L: int, Lk: int, like: Tensor) -> Tensor:
        """r of the distances of L queries and Lk keys, which a layer projects: [L + Lk - 1, 1, dim]. Dropout drops the
        same of it in all rows of the batch.
        """
        r = self.relative_positional_encoding(L, Lk).to(like.device)[1:]  # they begin a distance farther
        return self.dropout(F.pad(r, (0, 0, 0, 0, 0, L + Lk - 1 - len(r))))  # and, one-way, end at the query

    def seen(self, L: int, M: int, real, perm_mask, use_mems) -> tuple[Seen, Seen]:
        """Of the content stream and of the query stream, of L tokens and M remembered ones."""
        causal = self.attn_type == "uni"
        left = M if causal and self.same_length else None
        waits = real is None or real.device.type != "cpu" or torch.compiler.is_compiling()
        real = None if not waits and bool(real.all()) else real
        if perm_mask is None and (real is None or not use_mems):
            real = None if real is None else F.pad(real.bool(), (M, 0), value=True)
            one = Seen(causal, left, masks.padding(real, L))
            return one, one
        # What padding has seen counts where it is remembered, and it sees itself.
        hidden = 0 if perm_mask is None else perm_mask
        hidden = hidden if real is None else hidden + (1 - real)[:, None]
        visible = F.pad(hidden.expand(-1, L, -1) <= 0, (M, 0), value=True)
        itself = F.pad(torch.eye(L, dtype=torch.bool, device=visible.device), (M, 0))
        return Seen(causal, left, pairs(visible | itself)), Seen(causal, left, pairs(visible))


def pairs(visible: Tensor) -> dict[str, object]:
    """The arguments of `fastlm.attention` under which visible [B, L, Lk] bool is what queries see: an order, where it
    is one and can be looked at without waiting, or a bias of each pair.

    In an order the keys that fewer queries see rank higher, and a query ranks as the last key that it sees.
    """
    if visible.device.type == "cpu" and not torch.compiler.is_compiling():
        of_keys = -visible.sum(1, dtype=torch.int32)
        of_queries = torch.where(visible, of_keys[:, None], -visible.shape[1] - 1).amax(-1)
        if torch.equal(of_keys[:, None] <= of_queries[..., None], visible):
            return {"order": (of_queries, of_keys)}
    return {"bias": torch.where(visible, 0.0, -torch.inf)[:, None]}

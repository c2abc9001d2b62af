"""DeBERTa v1, v2 and v3: the rows that queries and keys meet, by distance."""

import torch
from torch import Tensor

from fastlm.interop.attention import Mask
from fastlm.interop.swap.masks import arguments, heads, mask
from fastlm.interop.swap.served import Served
from fastlm.nn.functional import attention
from fastlm.positions import Terms, Vectors, deberta_bucket
from fastlm.positions.deberta import C2P, P2C, PRODUCTS
from fastlm.positions.rows import buckets_of, rows_of

SELDOM = ("output_attentions",)


class Distances:
    """That positions count along the row: handed to layers where transformers hands the bucket of each pair."""


class SelfAttention(Served):
    """v2 and v3."""

    names = ("transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention",)
    how = "fastlm.attention with DeBERTa's rows by distance"

    @classmethod
    def refusal(cls, module) -> str | None:
        buckets = getattr(module, "position_buckets", -1)
        if buckets > 0 and not module.max_relative_positions - 1 > buckets // 2 >= 1:
            return f"position_buckets is {buckets} and max_relative_positions {module.max_relative_positions}"
        return None

    def forward(
        self,
        hidden_states,
        attention_mask,
        output_attentions=False,
        query_states=None,
        relative_pos=None,
        rel_embeddings=None,
    ) -> tuple[Tensor, None]:
        self.refuse({"output_attentions": output_attentions}, *SELDOM)
        if not isinstance(relative_pos, (Distances, type(None))):
            self.refuse_to("take relative_pos of each pair")
        query, key, value = self.project(hidden_states, query_states)
        if query.shape != key.shape:
            self.refuse_to("serve queries of another length than keys")
        terms = 1 + len(self.products())
        scale, position = (terms * query.shape[3]) ** -0.5, None
        if self.relative_attention and rel_embeddings is not None:
            position = self.position(self.pos_dropout(rel_embeddings), key)
        dropout = self.dropout.p if self.training else 0.0
        seen = arguments(attention_mask, query, key)
        return attention(query, key, value, position=position, scale=scale, dropout=dropout, **seen).transpose(
            1, 2
        ).flatten(2), None

    def products(self) -> list[str]:
        """Which of the two products with rows there are."""
        return [product for product in PRODUCTS if product in self.pos_att_type]

    def project(self, x: Tensor, of_queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L, D]."""
        of_queries = x if of_queries is None else of_queries
        return (self.heads(self.query_proj(of_queries)), self.heads(self.key_proj(x)), self.heads(self.value_proj(x)))

    def heads(self, x: Tensor) -> Tensor:
        return heads(x, self.attention_head_size)

    def buckets(self) -> tuple[int, int]:
        """(span, buckets), as in `fastlm.positions.DeBERTa`."""
        return self.max_relative_positions, max(self.position_buckets, 0)

    def position(self, table: Tensor, key: Tensor) -> Terms:
        """The rows of a table [2 · reach, dim], for as many queries as keys."""
        (span, buckets), L = self.buckets(), key.shape[2]
        reach = buckets or span
        distance = torch.arange(1 - L, L, device=key.device)
        behind = deberta_bucket(-distance, buckets, span) if buckets else -distance
        rows, buckets = buckets_of((behind + reach).clamp(0, 2 * reach - 1))
        if few := len(rows) < len(table):  # short texts meet few rows, and those alone are projected
            table = rows_of(table, rows)
        made = {
            product: self.heads(project(table)[None])[0]
            for product, project in self.projections().items()
            if product in self.pos_att_type
        }
        if not few:
            made = {product: rows_of(x.transpose(0, 1), rows).transpose(0, 1) for product, x in made.items()}
        vectors = Vectors(query_vectors=made.get(C2P), key_vectors=made.get(P2C), buckets=buckets)
        return Terms(vectors=vectors, size=(L, L, 0))

    def projections(self) -> dict:
        """What makes the rows of each product."""
        if self.share_att_key:
            return {C2P: self.key_proj, P2C: self.query_proj}
        return {C2P: getattr(self, "pos_key_proj", None), P2C: getattr(self, "pos_query_proj", None)}


class FirstSelfAttention(SelfAttention):
    """v1."""

    names = ("transformers.models.deberta.modeling_deberta.DisentangledSelfAttention",)

    @classmethod
    def refusal(cls, module) -> str | None:
        if unknown := {*module.pos_att_type} - {*PRODUCTS}:
            return f"its pos_att_type has {', '.join(sorted(unknown))}"
        return "talking_head is asked for" if module.talking_head else None

    def project(self, x: Tensor, of_queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if of_queries is not None:
            self.refuse_to("take query_states")
        query, key, value = self.transpose_for_scores(self.in_proj(x)).chunk(3, -1)
        of_heads = lambda bias: bias.view(self.num_attention_heads, 1, -1)
        return query + of_heads(self.q_bias), key, value + of_heads(self.v_bias)

    def buckets(self) -> tuple[int, int]:
        return self.max_relative_positions, 0

    def projections(self) -> dict:
        return {C2P: getattr(self, "pos_proj", None), P2C: getattr(self, "pos_q_proj", None)}


class Encoder(Served):
    names = (
        "transformers.models.deberta.modeling_deberta.DebertaEncoder",
        "transformers.models.deberta_v2.modeling_deberta_v2.DebertaV2Encoder",
    )
    parts = (SelfAttention, FirstSelfAttention)
    how = "masks and distances that are not dense"

    def forward(self, hidden_states, attention_mask, *args, **kwargs):
        asked = kwargs | dict(zip(("output_hidden_states", "output_attentions"), args, strict=False))
        self.refuse(asked, *SELDOM)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def get_attention_mask(self, attention_mask: Tensor) -> Mask | Tensor:
        if attention_mask.ndim > 2:
            return super().get_attention_mask(attention_mask).bool()
        return mask(attention_mask, attention_mask.shape[1], attention_mask.shape[1])

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None) -> Distances | Tensor | None:
        return Distances() if self.relative_attention and relative_pos is None else relative_pos

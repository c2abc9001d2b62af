"""BERT and its like with position_embedding_type="relative_key" or "relative_key_query", which transformers has before
5: a row by distance that queries meet, and keys too (Shaw et al. 2018; Huang et al. 2020).
"""

import torch
from torch import Tensor

from fastlm.interop.swap.masks import arguments, heads
from fastlm.interop.swap.served import Served
from fastlm.nn.functional import attention
from fastlm.positions import Terms, Vectors

# Directory of transformers.models, and what its classes begin with: one source, copied.
NAMES = {
    "bert": "Bert", "bert_generation": "BertGeneration", "bridgetower": "BridgeTower", "camembert": "Camembert",
    "data2vec": "Data2VecText", "electra": "Electra", "ernie": "Ernie", "megatron_bert": "MegatronBert",
    "roberta": "Roberta", "roberta_prelayernorm": "RobertaPreLayerNorm", "roc_bert": "RoCBert",
    "xlm_roberta": "XLMRoberta", "xlm_roberta_xl": "XLMRobertaXL", "xmod": "Xmod",
}  # fmt: skip


class SelfAttention(Served):
    names = tuple(
        f"transformers.models.{folder}.modeling_{'data2vec_text' if folder == 'data2vec' else folder}.{name}{kind}"
        for folder, name in NAMES.items()
        for kind in ("SelfAttention", "SdpaSelfAttention")
    )
    only_before_5 = True
    how = "fastlm.attention with rows by distance"

    @classmethod
    def refusal(cls, module) -> str | None:
        if not module.position_embedding_type.startswith("relative_key"):
            return "its positions are absolute, and before transformers 5 its masks are of each pair"
        return "it decodes, where distances count from the last key" if module.is_decoder else None

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        past_key_values=None,
        output_attentions=False,
        cache_position=None,
    ) -> tuple[Tensor, None]:
        asked = {"head_mask": head_mask, "output_attentions": output_attentions, "past_key_values": past_key_values}
        self.refuse(asked, *asked)
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        of_heads = lambda x: heads(x, self.attention_head_size)
        query, key, value = of_heads(self.query(hidden_states)), of_heads(self.key(read)), of_heads(self.value(read))
        position = self.position(query, query.shape[2], key.shape[2])
        dropout, seen = self.dropout.p if self.training else 0.0, arguments(attention_mask, query, key)
        scale = self.attention_head_size**-0.5
        out = attention(query, key, value, position=position, scale=scale, dropout=dropout, offset=0, **seen)
        return out.transpose(1, 2).flatten(2), None

    def position(self, query: Tensor, Lq: int, Lk: int) -> Terms:
        """The rows of the distances of queries and keys that both count from 0."""
        behind = torch.arange(Lq - 1, -Lk, -1, device=query.device)  # query minus key position
        rows = self.distance_embedding(behind + self.max_position_embeddings - 1)
        rows = rows.expand(self.num_attention_heads, -1, -1)
        both = self.position_embedding_type == "relative_key_query"
        return Terms(vectors=Vectors(query_vectors=rows, key_vectors=rows if both else None), size=(Lq, Lk, 0))

"""torch's own MultiheadAttention, as in nn.TransformerEncoderLayer and nn.TransformerDecoderLayer."""

from fastlm.interop.swap.served import Served
from fastlm.nn.multihead import attend, warn_of_weights


class TorchAttention(Served):
    """Where no weights are asked for. Evaluated without gradients, torch's encoder layers compute by a fused function
    of their own, as before.
    """

    names = ("torch.nn.modules.activation.MultiheadAttention",)
    how = "fastlm.attention where need_weights is False"
    anywhere = True

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):  # fmt: skip
        if need_weights or query.is_nested:
            warn_of_weights(need_weights)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return attend(self, query, key, value, key_padding_mask, attn_mask, is_causal), None

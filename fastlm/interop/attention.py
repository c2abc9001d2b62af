"""fastlm's attention in transformers' models, through transformers' own interfaces for attention and masks."""

import torch
from torch import Tensor

from fastlm.nn.functional import attention


def register() -> None:
    """Make attn_implementation="fastlm" known to transformers. Causal and bidirectional attention, grouped heads,
    dropout, T5's position bias, right-padding and growing caches are served; what is not is refused in words."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("fastlm", _attention)
    AttentionMaskInterface.register("fastlm", _mask)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """transformers' attention call: query [B, H, Lq, D], key, value [B, Hk, Lk, D] → ([B, Lq, H, D], no weights)."""
    for name in ("softcap", "sliding_window", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"attn_implementation='fastlm' does not serve {name} yet; use 'sdpa' or 'eager' for this model"
            )
    if attention_mask is not None and attention_mask.ndim != 1:
        raise NotImplementedError(
            f"attn_implementation='fastlm' takes no dense mask; got one of shape {list(attention_mask.shape)}. Use 'sdpa' for it"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = kwargs.get("position_bias")  # T5's, which its model made dense
    out = attention(
        query, key, value, bias=bias, causal=causal, key_lengths=attention_mask, dropout=dropout, scale=scaling
    )
    return out.transpose(1, 2), None


def _mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, **kwargs
) -> Tensor | None:
    """transformers' mask call: where theirs make an L×L tensor, ours gives key lengths [B], or None for no padding."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise NotImplementedError(
            "attn_implementation='fastlm' serves causal and bidirectional masks; use 'sdpa' for windows and packed rows"
        )
    if isinstance(q_offset, Tensor) or (
        q_offset + q_length != kv_offset + kv_length and mask_function is causal_mask_function
    ):
        raise NotImplementedError(
            "attn_implementation='fastlm' serves caches that grow; use the dynamic cache instead of a static one"
        )
    if attention_mask is None:
        return None
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    if not torch.equal(attention_mask, torch.arange(attention_mask.shape[1], device=lengths.device) < lengths[:, None]):
        raise ValueError(
            "attn_implementation='fastlm' takes padding on the right only; set tokenizer.padding_side = 'right'"
        )
    return lengths

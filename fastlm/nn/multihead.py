"""torch's multi-head attention with any positional scheme, and without a tensor of weights unless it is asked for."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.nn.functional import attention
from fastlm.nn.torch_forms import mask_arguments
from fastlm.positions import Position, make


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, whose arguments and state dict these are, by `fastlm.attention`.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn: torch's.
        kdim, vdim, batch_first, device, dtype: torch's.
        position: a scheme of `fastlm.positions`, or its name. None: no position, as in torch.

    Raises:
        ValueError: for a scheme that adds to embeddings, and with add_bias_kv or add_zero_attn, whose keys stand at no
            distance.

    It has a place in `torch.nn.TransformerEncoderLayer` (layer.self_attn = MultiheadAttention(...)); with a position
    torch's fused layer, which would not see it, is not taken. Make a `TransformerEncoder` of such layers with
    enable_nested_tensor=False.
    """

    def __init__(
        self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False, kdim=None,
        vdim=None, batch_first=False, device=None, dtype=None, *, position: Position | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if isinstance(position, str):
            position = make(position, dim=embed_dim, heads=num_heads, head_dim=self.head_dim, causal=False)
        if position is not None and position.embeds():
            raise ValueError(f"position {position.name!r} adds to token embeddings, which a layer does not see")
        if position is not None and (add_bias_kv or add_zero_attn):
            raise ValueError("position is given, and the keys of add_bias_kv and add_zero_attn stand at no distance")
        self.position = position
        if position is not None:  # by which torch's fused encoder layer knows that this is none of its own
            self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's, with one difference.

        Args:
            need_weights: whether the weights are wanted, which are a tensor of each pair: torch computes then, and a
                warning says so once. None, the default: True as in torch, and False with a position.
            query, key, value, key_padding_mask, attn_mask, average_attn_weights, is_causal: torch's.

        Returns:
            (output, weights or None), as torch.

        Raises:
            ValueError: for need_weights with a position, and for nested tensors with one.
        """
        if need_weights is None:
            need_weights = self.position is None
        if need_weights and self.position is not None:
            raise ValueError("need_weights is True, and with a position no weights are made; give need_weights=False")
        if query.is_nested and self.position is not None:
            raise ValueError(
                "query is nested, and a position counts along rows; give padded rows: a torch.nn.TransformerEncoder "
                "nests them unless it is made with enable_nested_tensor=False"
            )
        if need_weights or query.is_nested:
            warn_of_weights(need_weights)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return attend(self, query, key, value, key_padding_mask, attn_mask, is_causal, self.position), None


def warn_of_weights(needed: bool) -> None:
    """That torch computes, once for a place in the caller's code."""
    if needed and not torch.compiler.is_compiling():
        warnings.warn(
            "need_weights is True, as it is unless it is given: torch computes attention, by a tensor of each pair; "
            "give need_weights=False for fastlm's",
            stacklevel=4,
        )


def attend(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    attn_mask: Tensor | None, is_causal: bool, position: Position | None = None,
) -> Tensor:  # fmt: skip
    """The output of torch's module by `fastlm.attention`; arguments are those of its forward."""
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is True, a hint that attn_mask is causal, and attn_mask is None; give it too")
    whole = query.ndim == 3
    to_rows = lambda x: x[None] if not whole else x if module.batch_first else x.transpose(0, 1)
    q, k, v = (to_rows(x) for x in _projected(module, query, key, value))
    B, Lq, Lk = len(q), q.shape[1], k.shape[1]
    causal = is_causal and module.bias_k is None and not module.add_zero_attn  # whose keys all queries see
    if module.bias_k is not None:
        k, v = (torch.cat([x, more.expand(B, -1, -1)], 1) for x, more in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    more = (0, k.shape[1] - Lk)  # which are not hidden, be that False or 0
    seen: dict[str, object] = {"causal": True, "offset": 0} if causal else {}
    if key_padding_mask is not None:
        mask = F.pad(key_padding_mask.view(B, 1, 1, Lk), more)
        seen |= mask_arguments(~mask if mask.dtype == torch.bool else mask, B, Lq)
    if attn_mask is not None and not causal:
        mask = F.pad(attn_mask[None, None] if attn_mask.ndim == 2 else attn_mask.unflatten(0, (B, -1)), more)
        mask = torch.where(mask, -torch.inf, 0.0) if mask.dtype == torch.bool else mask
        seen["bias"] = mask + seen.get("bias", 0.0)
    q, k, v = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (q, k, v))
    out = attention(q, k, v, position=position, dropout=module.dropout if module.training else 0.0, **seen)
    out = module.out_proj(out.transpose(1, 2).flatten(2))
    return out[0] if not whole else out if module.batch_first else out.transpose(0, 1)


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, by as few products as there are different tensors."""
    weight, bias, E = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if weight is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    elif query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    elif key is value:
        made = F.linear(key, weight[E:], None if bias is None else bias[E:])
        return F.linear(query, weight[:E], biases[0]), *made.chunk(2, -1)
    else:
        weights = weight.chunk(3)
    return tuple(F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True))

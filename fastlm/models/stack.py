"""A stack of layers: what an encoder and a decoder are. A layer's sublayers are residual branches, each normed before
it is read (pre) or after it is added (post):

    embedded tokens (+ position.embed + type) → [norm] → [project] → layers → [norm]
    layer: attention → [attention to the encoder's states] → feed-forward layer
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import two_stream
from fastlm.models.config import ModelConfig
from fastlm.models.deberta import Convolution, MaskDecoder
from fastlm.models.inputs import Inputs
from fastlm.nn import MLP, NORMS, Attention, CrossAttention, Embedding, KVCache
from fastlm.positions import Learned, SharedTerms, Terms


class LayerInputs(NamedTuple):
    """What every layer of a stack is given besides its states and its cache.

    Args:
        terms: the scheme, or the part of it, that the stack's layers share; None where each has its own, or none.
        masks: arguments of `fastlm.attention` that hide keys of the stack's own tokens.
        memory: the encoder's states; None where there is no encoder.
        memory_masks: arguments of `fastlm.attention` that hide some of those.
    """

    terms: Terms | SharedTerms | None = None
    masks: dict = {}  # noqa: RUF012
    memory: Tensor | None = None
    memory_masks: dict = {}  # noqa: RUF012


class Block(nn.Module):
    """Self-attention, attention to the encoder where there is one, and feed-forward layer."""

    def __init__(self, config: ModelConfig, causal: bool, cross: bool, window: int | None):
        super().__init__()
        shape = dict(
            dim=config.dim, heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim,
            dropout=config.attention_dropout, scale=config.attention_scale,
        )  # fmt: skip
        self.attention_norm = make_norm(config, config.dim)
        self.attention = Attention(
            **shape,
            position=config.make_position(causal) if config.position_per_layer else None,
            causal=causal,
            bias=config.bias if config.qkv_bias is None else config.qkv_bias,
            out_bias=config.bias if config.out_bias is None else config.out_bias,
            key_bias=config.key_bias,
            relative_segments=config.relative_segments,
            window=window,
        )
        self.cross_norm = make_norm(config, config.dim) if cross else None
        self.cross = CrossAttention(**shape, bias=config.bias) if cross else None
        self.mlp_norm = make_norm(config, config.dim)
        self.mlp = MLP(
            config.dim,
            config.mlp_width,
            activation=config.activation,
            gated=config.gated,
            bias=config.bias,
            dropout=config.activation_dropout,
        )
        self.pre, self.dropout = config.norm_place == "pre", config.dropout

    def forward(
        self,
        x: Tensor,
        inputs: LayerInputs,
        cache: KVCache | None = None,
        keys: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, L, dim] → [B, L, dim]; with keys, which `keys` made, x's tokens attend to those instead."""
        attend = lambda x: self.attention(x, keys=keys, position=inputs.terms, cache=cache, **inputs.masks)
        branches = [(self.attention_norm, attend), (self.mlp_norm, self.mlp)]
        if self.cross is not None:
            recall = lambda x: self.cross(x, inputs.memory, cache=cache, **inputs.memory_masks)
            branches.insert(1, (self.cross_norm, recall))
        drop = lambda x: F.dropout(x, self.dropout, self.training)
        if not self.pre:
            for norm, sublayer in branches:
                x, _ = norm(drop(sublayer(x)), x)
            return x
        branch = None  # what the next norm adds to x in its pass
        for norm, sublayer in branches:
            y, x = (norm(x), x) if branch is None else norm(branch, x)
            branch = drop(sublayer(y))
        return x + branch

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of x [B, Lk, dim], for `forward`."""
        return self.attention.keys(self.attention_norm(x) if self.pre else x)


class Stack(nn.Module):
    """An encoder or a decoder: embedded tokens [B, L, embedding_dim] → states [B, L, dim].

    Args:
        config: the model's shape.
        layers: how many it has.
        causal: whether later tokens are hidden.
        cross: whether layers attend to an encoder's states too.
    """

    def __init__(self, config: ModelConfig, layers: int, causal: bool, cross: bool = False):
        super().__init__()
        self.config, self.causal, self.layers = config, causal, layers
        per_layer = config.position_per_layer
        self.position = config.make_shared_position() if per_layer else config.make_position(causal)
        self.absolute_position = Learned(config.context, config.embedding_width) if config.absolute_positions else None
        self.types = Embedding(config.token_types, config.embedding_width) if config.token_types else None
        self.embedding_norm = make_norm(config, config.embedding_width) if config.embedding_norm else None
        narrow = config.embedding_width != config.dim
        self.project = nn.Linear(config.embedding_width, config.dim) if narrow else None
        groups = layers if config.shared_groups is None else config.shared_groups
        window = lambda group: config.windows[group % len(config.windows)] if config.windows else None
        self.blocks = nn.ModuleList(
            Block(config, causal, cross, window(group)) for group in range(groups) for _ in range(config.group_blocks)
        )
        self.convolution = Convolution(config, make_norm(config, config.dim)) if config.conv_width else None
        self.mask_decoder = MaskDecoder(config) if config.mask_decoder else None
        self.queries = two_stream.QueryStream(config) if config.two_streams else None
        final = config.norm_place == "pre" if config.final_norm is None else config.final_norm
        self.norm = make_norm(config, config.dim) if final else None

    @property
    def depth(self) -> int:
        """How many blocks states pass, shared ones counted each time."""
        return self.layers * self.config.group_blocks

    def order(self) -> list[Block]:
        """The blocks in the order in which states pass them, shared ones more than once."""
        groups, each = len(self.blocks) // self.config.group_blocks, self.config.group_blocks
        firsts = (layer * groups // self.layers * each for layer in range(self.layers))
        return [self.blocks[first + i] for first in firsts for i in range(each)]

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """States of embedded tokens.

        Args:
            x: [B, L, embedding_dim], token embeddings.
            inputs: what else the call gave.

        Returns:
            [B, L, dim], or [B, P, dim] where inputs has predicted tokens.
        """
        L, memory = x.shape[1], inputs.memory
        places = inputs.places(L, self.config.skip_padding, x.device)
        of_layers = LayerInputs(
            None if self.position is None else self.position.terms(L, inputs.seen + L, device=x.device, dtype=x.dtype),
            inputs.masks(L, self.config.relative_segments),
            None if memory is None else memory.states,
            inputs.memory_masks(L),
        )
        x = self._layers(self._embedded(x, inputs.types, places), of_layers, inputs, places)
        x = x if self.norm is None else self.norm(x)
        return F.dropout(x, self.config.final_dropout, self.training)

    def _embedded(self, x: Tensor, types: Tensor | None, places: Tensor) -> Tensor:
        """What the first block reads: [B, L, embedding_dim] → [B, L, dim]."""
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if self.absolute_position is not None:
            x = x + self.absolute_position.embed(places).to(x.dtype)
        if self.position is not None and (added := self.position.embed(places)) is not None:
            x = x + added.to(x.dtype)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        dropout = self.config.dropout if self.config.embedding_dropout is None else self.config.embedding_dropout
        x = F.dropout(x, dropout, self.training)
        return x if self.project is None else self.project(x)

    def _layers(self, x: Tensor, of_layers: LayerInputs, inputs: Inputs, places: Tensor) -> Tensor:
        """`forward` from the first block to the last."""
        blocks, embedded, queries = self.order(), x, None
        caches, recurrence, predicted = inputs.caches, inputs.recurrence, inputs.predicted
        if predicted is not None:
            queries, of_queries = self.queries(predicted), self.queries.inputs(of_layers, predicted)
            queries = F.dropout(queries, self.config.dropout, self.training)
        for i, block in enumerate(blocks if self.mask_decoder is None else blocks[:-1]):
            keys = None
            if recurrence is not None or queries is not None:
                keys = block.keys(x if recurrence is None else recurrence.extend(i, x))
            queries = None if queries is None else block(queries, of_queries, keys=keys)
            if queries is None or i < len(blocks) - 1:  # queries need no content after the last block
                x = block(x, of_layers, caches[i] if caches else None, keys)
            if i == 0 and self.convolution is not None:
                x = self.convolution(embedded, x, inputs.documents())
        if self.mask_decoder is not None:
            return self.mask_decoder(x, places, blocks[-1], of_layers)
        return x if queries is None else queries


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    bias = config.bias if config.norm_bias is None else config.norm_bias
    options = {"bias": bias} if config.norm == "layernorm" else {}
    return NORMS[config.norm](width, eps=config.norm_eps, **options)

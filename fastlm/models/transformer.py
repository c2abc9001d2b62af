"""One Transformer. What makes it a GPT-2 or a Llama is data: a row of `fastlm.models.presets`.

    tokens → embedding (+ position.embed) → [norm → attention → +, norm → mlp → +] × layers → norm → head

The positional scheme belongs to the model: its rotation and its distance table are made once a forward pass and every
layer uses them, so a T5 table's gradient is summed over layers by autograd. Schemes that say `per_layer` belong to each
layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.masks import position_ids
from fastlm.models.config import ModelConfig
from fastlm.nn import MLPS, NORMS, Attention, KVCache
from fastlm.positions import Terms


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        position = config.make_position() if config.position_per_layer else None
        self.attention = Attention(config.dim, config.heads, config.kv_heads, position=position, bias=config.bias)
        self.mlp_norm = make_norm(config)
        self.mlp = MLPS[config.mlp](config.dim, config.mlp_width, config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor, position: Terms | None, segments: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), position=position, segments=segments, cache=cache))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """A decoder-only language model: tokens [B, L] int64 → logits [B, L, vocab_size].

    Args:
        config: the model's shape. Weights start as `init_weights` draws them.

    Depending on config it is GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023), or a mixture of both.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position = None if config.position_per_layer else config.make_position()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw weights as GPT-2 (Radford et al. 2019): normal with standard deviation 0.02, biases zero, norms one.

        The N = 2·layers matrices that write to the residual stream have 0.02/√N instead. Positional schemes draw their
        own.
        """
        for name, p in self.named_parameters():
            if "position." in name or p.ndim < 2:  # schemes have their own
                continue
            nn.init.normal_(p, std=0.02 / (2 * self.config.layers) ** 0.5 if name.endswith(".out.weight") else 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits of each next token.

        Args:
            tokens: [B, L] int64.
            caches: one `KVCache` a layer, from `new_caches`; tokens then continue what the caches hold, and join it.
            segments: [B, L] int, without caches: documents packed into a row do not mix, and each starts at position 0
                (`masks.segments_from_cu_seqlens`).

        Returns:
            [B, L, vocab_size] in the weights' dtype, or in autocast's.

        Raises:
            IndexError: for more tokens than learned positions.
            ValueError: for segments or caches that do not fit.
        """
        seen = len(caches[0]) if caches else 0
        total = seen + tokens.shape[1]
        ids = torch.arange(seen, total, device=tokens.device) if segments is None else position_ids(segments)
        x = self.embedding(tokens)
        terms = None
        if self.position is not None:
            embedded = self.position.embed(ids)
            x = x if embedded is None else x + embedded.to(x.dtype)
            terms = self.position.terms(tokens.shape[1], total, device=tokens.device)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, terms, segments, caches[i] if caches else None)
        return self.head(self.norm(x))

    def new_caches(self) -> list[KVCache]:
        """Empty caches, one a layer, for `forward`."""
        return [KVCache() for _ in self.blocks]

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, n: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue texts by sampling from softmax(logits / temperature), one token at a time.

        Past `context` tokens, the model reads on from the last half of them, so that no scheme is asked for distances
        it did not train.

        Args:
            tokens: [B, L] int64, the texts to continue; all of one length.
            n: how many tokens to add.
            temperature: of the softmax; 0 takes the likeliest token. Default 1.
            generator: of the random numbers, on the tokens' device. None: torch's own.

        Returns:
            [B, L + n] int64, the texts given and what was added.
        """
        caches = self.new_caches()
        new = tokens
        for _ in range(n):
            # start over on half a context: cheap, and within what was trained
            if len(caches[0]) + new.shape[1] > self.config.context:
                caches, new = self.new_caches(), tokens[:, -max(1, self.config.context // 2) :]
            logits = self(new, caches)[:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, new), 1)
        return tokens

    def parameter_count(self) -> int:
        """Numbers trained, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())


def make_norm(config: ModelConfig) -> nn.Module:
    options = {"bias": config.bias} if config.norm == "layernorm" else {}
    return NORMS[config.norm](config.dim, eps=config.norm_eps, **options)

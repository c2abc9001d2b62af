"""One Transformer. What makes it a GPT-2, a Llama, a BERT or a T5 is data: a row of `fastlm.models.presets`.

    decoder, encoder     tokens → embedding → stack → head
    encoder–decoder      tokens → embedding → encoder ─┐
                         decoder's tokens → embedding → decoder → head

The positional scheme belongs to a stack: its rotation and its distance table are made once a forward pass and every
layer uses them, so a T5 table's gradient is summed over layers by autograd. Schemes that say `per_layer` belong to each
layer.
"""

import torch
from torch import Tensor, nn

from fastlm.models.config import ModelConfig
from fastlm.models.generation import generate
from fastlm.models.heads import DetectionHead, LMHead, PairHead
from fastlm.models.init import init_weights
from fastlm.models.inputs import Inputs, Memory, shape_of
from fastlm.models.recurrence import Recurrence
from fastlm.models.stack import Stack
from fastlm.nn import Embedding, KVCache


class Transformer(nn.Module):
    """A decoder, an encoder, or one of each: tokens [B, L] int64 → logits [B, L, vocab_size].

    Args:
        config: the model's shape. Weights start as config.init says.

    Attributes:
        embedding: [vocab_size, embedding_dim], the token embedding that both stacks share.
        encoder: a `Stack`, or None.
        decoder: a `Stack`, or None.
        head: what turns states into logits: an `LMHead`, a `DetectionHead`, or None.
        pair_head: a `PairHead` on the first token, or its pooler alone, or None.

    Depending on config it is GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023), BERT (Devlin et al. 2019), T5
    (Raffel et al. 2020), another row of presets.py, or a mixture.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        both = config.kind == "encoder-decoder"
        encoder_layers = config.layers if config.encoder_layers is None else config.encoder_layers
        self.embedding = Embedding(config.vocab_size, config.embedding_width)
        self.encoder = None if config.kind == "decoder" else Stack(config, encoder_layers, causal=False)
        self.decoder = None if config.kind == "encoder" else Stack(config, config.layers, causal=True, cross=both)
        self.head = None if config.head == "none" else self._make_head()
        self.pair_head = PairHead(config.dim, config.pair_labels) if config.pair_labels or config.pooler else None
        self.init_weights()

    def init_weights(self) -> None:
        """Draw weights anew, as config.init says; those of positional schemes have a `reset_parameters` for it."""
        init_weights(self, self.config)

    def _make_head(self) -> nn.Module:
        return LMHead(self.config, self.embedding) if self.config.head == "lm" else DetectionHead(self.config)

    def forward(self, tokens: Tensor, decoder_tokens: Tensor | None = None, **options) -> Tensor:
        """What the head makes of `states`: logits of each next token of a decoder, of each token of an encoder.

        Args:
            tokens: [B, L] int64.
            decoder_tokens: [B, T] int64, of an encoder–decoder.
            options: as in `states`.

        Returns:
            [B, L, vocab_size] ([B, T, vocab_size] with decoder_tokens; [B, L] from a detection head; the states where
            config has no head), in the weights' dtype, or in autocast's.

        Raises:
            IndexError: for more tokens than learned positions.
            ValueError: for arguments that do not fit the config or one another.
        """
        x = self.states(tokens, decoder_tokens, **options)
        return x if self.head is None else self.head(x)

    def states(
        self,
        tokens: Tensor | None,
        decoder_tokens: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        decoder_segments: Tensor | None = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        prefix: Tensor | None = None,
        memory: Memory | None = None,
        caches: list[KVCache] | None = None,
        recurrence: Recurrence | None = None,
        ranks: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        """The last states, which heads read.

        Args:
            tokens: [B, L] int64; None for an encoder–decoder that is given memory.
            decoder_tokens: [B, T] int64, of an encoder–decoder alone.
            attention_mask: [B, L] bool or int, which tokens are real; the others are padding, on any side. Of a decoder
                with caches [B, len(cache) + L], of all tokens so far.
            decoder_attention_mask: likewise of decoder_tokens.
            segments: [B, L] int, without caches: documents packed into a row do not mix, and each starts at position 0
                (`masks.segments_from_cu_seqlens`).
            decoder_segments: [B, T] int; packed decoder tokens attend to the encoder's of the same number.
            token_types: [B, L] int64 below config.token_types. None: all 0.
            positions: [L] or [B, L] int64, of the decoder's tokens or a lone encoder's, for schemes that add to
                embeddings. None: 0, 1, … along the row or the segment, after what caches hold.
            prefix: [B] int, of a decoder; tokens before it see one another (prefix language modelling).
            memory: what `encode` made of tokens, to use it again.
            caches: one `KVCache` for each of the decoder's layers, from `new_caches`; its tokens then continue what
                they hold, and join it.
            recurrence: the segments before, from `new_recurrence`, of a decoder or an encoder that stands alone; its
                tokens then continue what it holds, and join it. attention_mask is then [B, len(recurrence) + L].
            ranks: [B, L] int, of a lone encoder; tokens see those that rank no higher (two_stream.py).
            predicted: [B, P] int64, with ranks: the tokens to predict, of which the query stream's states are returned.

        Returns:
            [B, L, dim], [B, T, dim] with decoder_tokens, or [B, P, dim] with predicted.

        Raises:
            IndexError, ValueError: as `forward`.
        """
        if (decoder_tokens is None) == (self.config.kind == "encoder-decoder"):
            raise ValueError(
                f"a model of kind {self.config.kind!r} "
                + ("takes decoder_tokens too" if decoder_tokens is None else "takes no decoder_tokens")
            )
        if decoder_tokens is None:
            stack = self.decoder or self.encoder
            inputs = Inputs(
                attention_mask, segments, token_types, positions, prefix, caches=caches, recurrence=recurrence,
                ranks=ranks, predicted=predicted,
            )  # fmt: skip
            inputs.check(tokens, self.config, stack.depth)
            (x,) = self._embedded(tokens)
            return stack(x, inputs)
        if not all(x is None for x in (recurrence, ranks, predicted)):
            raise ValueError("recurrence, ranks and predicted are for a decoder or an encoder that stands alone")
        if memory is None:
            given = Inputs(attention_mask, segments, token_types)
            given.check(tokens, self.config, self.encoder.depth)
            x, y = self._embedded(tokens, decoder_tokens)
            memory = self._memory(x, given)
        elif not all(x is None for x in (tokens, attention_mask, segments, token_types)):
            raise ValueError(
                "memory is given, which is what encode made of tokens, mask, segments and types; leave these out"
            )
        else:
            (y,) = self._embedded(decoder_tokens)
        inputs = Inputs(decoder_attention_mask, decoder_segments, None, positions, prefix, memory, caches)
        inputs.check(decoder_tokens, self.config, self.decoder.depth)
        return self.decoder(y, inputs)

    def encode(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Memory:
        """The encoder's part of `states`, whose arguments these are: what an encoder–decoder's decoder attends to."""
        given = Inputs(attention_mask, segments, token_types)
        given.check(tokens, self.config, self.encoder.depth)
        (x,) = self._embedded(tokens)
        return self._memory(x, given)

    def new_caches(self, capacity: int = 0) -> list[KVCache]:
        """Empty caches for the decoder, one a layer, for `states` and `forward`.

        Args:
            capacity: tokens for which memory is allocated at first.
        """
        if self.decoder is None:
            raise ValueError("an encoder sees all tokens at once and keeps no caches")
        return [KVCache(capacity) for _ in range(self.decoder.depth)]

    def generate(self, tokens: Tensor, n: int, temperature: float = 1.0, generator=None, **options) -> Tensor:
        """Write up to n tokens after texts [B, L], or in answer to them: `fastlm.models.generation.generate`."""
        return generate(self, tokens, n, temperature, generator, **options)

    def new_recurrence(self, length: int | None = None) -> Recurrence:
        """An empty memory of segments, for `states` and `forward`.

        Args:
            length: tokens it holds at most; None for config.memory. Evaluation may hold more than training did.

        Raises:
            ValueError: for an encoder–decoder, whose texts do not continue one another, and where length is 0.
        """
        length = self.config.memory if length is None else length
        if self.config.kind == "encoder-decoder" or length < 1:
            raise ValueError(
                f"the model is of kind {self.config.kind!r} and the length is {length}; a recurrence is for a decoder "
                "or an encoder alone, with memory in its config or a length of at least 1"
            )
        return Recurrence(length, self.config.memory_reuse)

    def parameter_count(self) -> int:
        """Numbers trained, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def _memory(self, x: Tensor, given: Inputs) -> Memory:
        """What a decoder attends to, of the encoder's embedded tokens."""
        return Memory(self.encoder(x, given), None if given.real is None else given.real.bool(), given.segments)

    def _embedded(self, *tokens: Tensor) -> list[Tensor]:
        """Of each [B, L] the embeddings, [B, L, embedding_dim]; looked up all at once, for then the table, which may be
        most of a model, has one gradient.
        """
        shapes = [shape_of(ids) for ids in tokens]
        x = self.embedding(tokens[0] if len(tokens) == 1 else torch.cat([ids.flatten() for ids in tokens]))
        x = x * self.config.dim**0.5 if self.config.scale_embedding else x
        if len(tokens) == 1:
            return [x]
        return [part.view(*shape, -1) for shape, part in zip(shapes, x.split([B * L for B, L in shapes]), strict=True)]

"""What DeBERTa has beside a BERT with positions in its layers: the decoder that shows absolute positions to the head
alone, the convolution of v2's large models, and v3's embedding shared by generator and discriminator.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models.config import ModelConfig
from fastlm.nn import ACTIVATIONS
from fastlm.nn.embedding import embedding
from fastlm.positions import Learned

if TYPE_CHECKING:
    from fastlm.models.stack import Block, LayerInputs


class MaskDecoder(nn.Module):
    """The enhanced mask decoder (He et al. 2021): the last block twice, with absolute positions in its queries.

    Its queries start as the states before the last block plus a learned vector of each position; keys and values are
    those states, both times. What the head of masked tokens reads is the second one's output, in place of the block's.

    Args:
        config: the model's shape. Its parameter is position.weight [context, dim].
    """

    STEPS = 2

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.position = Learned(config.context, config.dim)

    def forward(self, x: Tensor, positions: Tensor, block: "Block", inputs: "LayerInputs") -> Tensor:
        """x [B, L, dim], the states before the last block → [B, L, dim]."""
        queries, keys = x + self.position.embed(positions).to(x.dtype), block.keys(x)
        for _ in range(self.STEPS):
            queries = block(queries, inputs, keys=keys)
        return queries


class Convolution(nn.Module):
    """norm(states + activation(conv(embedded))), after the first layer: n-grams, in the released code of DeBERTa v2.

    Args:
        config: the model's shape.
        norm: of the sum.
    """

    def __init__(self, config: ModelConfig, norm: nn.Module):
        super().__init__()
        width, groups = config.conv_width, config.conv_groups
        self.activation, self.dropout = config.conv_activation, config.dropout
        self.conv = nn.Conv1d(config.dim, config.dim, width, padding=(width - 1) // 2, groups=groups)
        self.norm = norm

    def forward(self, embedded: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
        """embedded [B, L, dim], the first layer's input; x [B, L, dim], its output; documents [B, L] int, what each
        token belongs to, padding to one of its own, None for one → [B, L, dim].
        """
        y = self.conv(embedded.mT).mT if documents is None else self._within(embedded, documents)
        y = F.dropout(y, self.dropout, self.training)
        return self.norm(ACTIVATIONS[self.activation](y), x)[0]

    def _within(self, x: Tensor, documents: Tensor) -> Tensor:
        """The convolution, in which tokens of other documents are zeros: a matrix product for each distance."""
        L, (reach,) = x.shape[1], self.conv.padding
        wide, around = F.pad(x, (0, 0, reach, reach)), F.pad(documents, (reach, reach))
        y = self.conv.bias
        for tap in range(2 * reach + 1):
            stranger = around[:, tap : tap + L] != documents
            near = wide[:, tap : tap + L].masked_fill(stranger[..., None], 0)
            weight = self.conv.weight[..., tap : tap + 1]
            y = y + F.conv1d(near.mT, weight, groups=self.conv.groups).mT
        return y


class DisentangledEmbedding(nn.Module):
    """A discriminator's embedding: the generator's, which it does not train, plus a difference, which starts as zeros
    (He et al. 2023, sec. 3.3, gradient-disentangled embedding sharing). tokens int64 → [..., dim].

        discriminator.embedding = DisentangledEmbedding(generator.embedding)

    Args:
        generator: the generator's token embedding. It stays the generator's: no parameter of this module, nor in its
            state dict. In one module with the generator, as in `Electra`, both are moved and copied together; a copy of
            the discriminator by itself has a generator of its own.

    Attributes:
        delta: [vocab_size, dim], the difference.
    """

    def __init__(self, generator: nn.Embedding):
        super().__init__()
        self.delta = nn.Parameter(generator.weight.new_zeros(generator.weight.shape))
        self._generator = (generator,)  # in a tuple, where nn.Module registers nothing

    @property
    def weight(self) -> Tensor:
        """[vocab_size, dim], the sum: what a discriminator that is saved alone has as its embedding."""
        return self._generator[0].weight.detach() + self.delta

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self._generator[0].weight.detach()) + embedding(tokens, self.delta)

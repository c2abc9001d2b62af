"""XLNet's second stream (Yang et al. 2019, sec. 2.3): what predicts a token knows its place and not its content.

The content stream is an encoder whose tokens see those that rank no higher. A query at each predicted token starts from
one learned vector and passes the same layers: its keys and values are the content stream's, of the tokens that rank
lower than its own. The head reads the queries.

Ranks say in which order a row's tokens are guessed, lowest first. They are the permutation mask of transformers with

    perm_mask[b, i, j] = ranks[b, j] > ranks[b, i] - (1 if i is predicted in row b else 0)

so tokens that are not predicted and share a rank see one another; the tokens that are given, -1, are seen by all.
Predicted tokens have ranks of their own. A recurrence is seen by all.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastlm.models.config import ModelConfig

if TYPE_CHECKING:
    from fastlm.models.stack import LayerInputs


class QueryStream(nn.Module):
    """Where a stack's second stream starts, and what its layers are given.

    Args:
        config: the model's shape. The parameter is start [1, dim].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.start = nn.Parameter(torch.empty(1, config.dim))

    def forward(self, predicted: Tensor) -> Tensor:
        """predicted [B, P] int64 → [B, P, dim]."""
        if predicted.device.type == "cpu" and not torch.compiler.is_compiling():
            ordered = predicted.sort(-1).values
            if (ordered[:, 1:] == ordered[:, :-1]).any():
                raise ValueError(f"predicted names a token of a row twice; got {predicted.tolist()}")
        return self.start.expand(*predicted.shape, -1)

    def inputs(self, inputs: "LayerInputs", predicted: Tensor) -> "LayerInputs":
        """The content stream's inputs → this one's."""
        of_queries, of_keys = inputs.masks["order"]
        return inputs._replace(masks=inputs.masks | {"order": (of_queries - 1, of_keys), "rows": predicted})


def order(ranks: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """Ranks [B, L] int → attention's order: of queries, and of keys, `before` tokens of a recurrence among them."""
    first = ranks.min() - 1  # at most the rank of any query, of the query stream too
    return ranks, torch.cat((first.expand(len(ranks), before), ranks), 1)


def groups(types: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """Types [B, L] int → groups of queries and of keys; those of a recurrence have type 0."""
    return types, torch.cat((types.new_zeros(len(types), before), types), 1)

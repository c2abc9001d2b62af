"""Token embeddings, in the place of torch.nn's."""

import torch
from torch import Tensor, nn

from fastlm.nn import checks, vocabulary
from fastlm.ops.embedding import NO_PADDING
from fastlm.ops.embedding import embedding as op

INTEGERS = (torch.int64, torch.int32)


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of a table: weight[ids], whose gradient is summed in fp32, in the order of the tokens, without atomics.

    Args:
        ids: [...] int64 or int32, 0 … V - 1.
        weight: [V, D] floats; or a DTensor of which ranks hold rows, Shard(0) over one dimension of its mesh.
        padding_idx: the token whose row has no gradient, counted from the end where it is negative. Default None.

    Returns:
        [..., D], in weight's dtype: the same on every rank of weight's mesh, and a DTensor where ids are one.

    Raises:
        ValueError: for shapes, dtypes, devices, placements or a padding_idx that do not fit.
        IndexError: on a CPU for ids that are no tokens, which elsewhere would have to be waited for.

    torch.nn.functional.embedding, but for max_norm, scale_grad_by_freq and sparse gradients. Differentiable once.
    """
    checks.no_tracing("embedding")
    checks.tensors(ids=ids, weight=weight)
    if ids.dtype not in INTEGERS:
        raise ValueError(f"ids are {ids.dtype}; give int64 or int32")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}; give floats [V, D]")
    checks.devices(weight, ids=ids)
    V = len(weight)
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"padding_idx is {padding_idx}; give a token of {V}, or None")
    padding = NO_PADDING if padding_idx is None else padding_idx % V
    here, tokens = vocabulary.part(weight), vocabulary.whole(weight, ids=ids).long()
    if here.group:
        return vocabulary.like(ids, _rows_of_ranks(tokens, here, padding))
    try:
        return vocabulary.like(ids, op(tokens, here.weight, padding))
    except IndexError:
        raise _no_tokens(tokens, V) from None


def _rows_of_ranks(ids: Tensor, here: vocabulary.Part, padding: int) -> Tensor:
    """Each rank's own rows, and zeros, to which the other ranks add theirs."""
    if ids.device.type == "cpu" and not ((ids >= 0) & (ids < here.words)).all():
        raise _no_tokens(ids, here.words)
    own = range(here.first, here.first + len(here.weight))
    known = (ids >= own.start) & (ids < own.stop)
    rows = op((ids - here.first).where(known, 0), here.weight, padding - here.first if padding in own else NO_PADDING)
    return vocabulary.AddedUp.apply(rows.where(known[..., None], 0), here.group)


def _no_tokens(ids: Tensor, V: int) -> IndexError:
    wrong = ids[(ids < 0) | (ids >= V)]
    return IndexError(f"ids hold {int(wrong[0])}; give 0 to {V - 1}")


class Embedding(nn.Embedding):
    """torch.nn.Embedding, with its arguments and state dict, by `fastlm.embedding`.

    Args:
        num_embeddings: V, how many tokens there are.
        embedding_dim: D, the width of each one's row.
        padding_idx: the token whose row starts as zeros and has no gradient. Default None.
        max_norm, scale_grad_by_freq, sparse: torch's defaults alone, None, False and False.
        device, dtype: of the weight [V, D], which starts as N(0, 1).

    Raises:
        ValueError: for options that `fastlm.embedding` has not.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
    ):
        asked = dict(max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
        for name, value in asked.items():
            if value:
                raise ValueError(f"{name} is {value!r}, which fastlm.nn.Embedding has not; use torch.nn.Embedding")
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, _weight=_weight, _freeze=_freeze, device=device, dtype=dtype
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., embedding_dim]."""
        return embedding(ids, self.weight, self.padding_idx)

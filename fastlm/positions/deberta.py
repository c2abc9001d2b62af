"""DeBERTa's disentangled attention: one table of distances, which each layer projects to keys and to queries."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import at_least_zero, below_one, flag, whole
from fastlm.positions.base import Projection, Vectors
from fastlm.positions.rows import buckets_of, rows_of
from fastlm.positions.shared import LayerPosition, Project, SharedPart

C2P, P2C = PRODUCTS = ("c2p", "p2c")  # content to position: queries meet rows; position to content: keys do


class DistanceTable(SharedPart):
    """A learned row for each distance: distance [n] int64 → (table [2·reach, dim], and what `rows.buckets_of` gives).

    Its parameters are weight [2·reach, dim] and, with norm_eps, norm.weight and norm.bias.

    Args:
        dim: width of the table.
        span: as in `DeBERTa`.
        buckets: as in `DeBERTa`; reach is buckets, or span without them.
        norm_eps: as in `DeBERTa`.
    """

    def __init__(self, dim: int, span: int = 512, buckets: int = 0, norm_eps: float = 0.0):
        super().__init__()
        whole(1, dim=dim)
        whole(1, "give the farthest distance told apart, such as 512", span=span)
        whole(0, "give how many distances are told apart, such as 256, or 0 for v1's", buckets=buckets)
        at_least_zero(norm_eps=norm_eps)
        if buckets:
            _check_buckets(buckets, span)
        self.span, self.buckets = span, buckets
        self.weight = nn.Parameter(torch.empty(2 * (buckets or span), dim))
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if norm_eps else None
        self.reset_parameters()

    def forward(self, distance: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        behind, reach = -distance, self.buckets or self.span
        if self.buckets:
            behind = deberta_bucket(behind, self.buckets, self.span)
        table = self.weight if self.norm is None else self.norm(self.weight)
        return table, *buckets_of((behind + reach).clamp(0, 2 * reach - 1))


class DeBERTa(LayerPosition, name="deberta"):
    """Disentangled attention (He et al. 2021, eq. 4): the score is (q·k + q·K(d) + k·Q(d)) / √(3D).

    Both terms take the same d, as the released code does. A table [2·span, dim] of distances (2·buckets with buckets)
    is projected by `key` and `query` to K and Q. The layers of a model share the table.

    The rows are torch.mm's, whose bits depend on torch's number of threads; `terms` that are made once and used again
    keep theirs.

    Args:
        dim: width of the model, and of the table.
        heads: number of heads.
        head_dim: channels of a head, D.
        span: the farthest distance told apart, in tokens; at least 1. Default 512.
        buckets: v2 and v3 count distances exactly up to buckets/2 and logarithmically up to span, see `deberta_bucket`.
            Default 0: every distance by itself, as in v1.
        pos_att_type: which of the two terms there are: "c2p" for q·K(d), "p2c" for k·Q(d). Default both. The score is
            divided by √((1 + terms)·D).
        share_att_key: whether the layer's own projections of keys and queries make K and Q (v3); of models alone, whose
            layers share a table. Default False.
        key_bias: whether `key` has a bias (v2). Default False.
        norm_eps: epsilon of a LayerNorm on the table (v2, v3). Default 0: no norm.
        dropout: share of the table that each layer drops while training, in [0, 1). Default 0.
        shared: whether the table is a stack's `DistanceTable` instead of its own. Default False.

    Raises:
        ValueError: for span < 1, with buckets unless buckets ≥ 2 and span > buckets // 2 + 1, for another
            pos_att_type, and for share_att_key of a scheme that stands alone.
    """

    part = DistanceTable

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        span: int = 512,
        buckets: int = 0,
        pos_att_type: tuple[str, ...] = PRODUCTS,
        share_att_key: bool = False,
        key_bias: bool = False,
        norm_eps: float = 0.0,
        dropout: float = 0.0,
        shared: bool = False,
    ):
        super().__init__()
        whole(1, dim=dim, heads=heads, head_dim=head_dim)
        if not isinstance(pos_att_type, (tuple, list)) or not pos_att_type or not {*pos_att_type} <= {*PRODUCTS}:
            raise ValueError(f"pos_att_type is {pos_att_type!r}; give ('c2p', 'p2c'), or one of the two in a tuple")
        flag(share_att_key=share_att_key, key_bias=key_bias, shared=shared)
        below_one(dropout=dropout)
        if share_att_key and not shared:
            raise ValueError(
                "share_att_key is True; a scheme that stands alone has no layer whose projections to share"
            )
        self.heads, self.pos_att_type, self.dropout = heads, tuple(pos_att_type), dropout
        self.table = None if shared else DistanceTable(dim, span, buckets, norm_eps)
        own = lambda product: product in pos_att_type and not share_att_key
        self.key = Projection(dim, heads * head_dim, bias=key_bias) if own(C2P) else None
        self.query = Projection(dim, heads * head_dim) if own(P2C) else None

    def own_part(self) -> SharedPart | None:
        return self.table

    def complete(self, part: tuple, distance: Tensor, project: Project | None = None) -> Vectors:
        """query_vectors and key_vectors [heads, n or buckets, head_dim], with terms=3."""
        table, rows, buckets = part
        table = F.dropout(table, self.dropout, self.training)
        few = len(rows) < len(table)  # short texts meet few rows, and those alone are projected
        table = rows_of(table, rows) if few else table
        if self.key is None and self.query is None:
            queries, keys = project(table)
            keys = keys.repeat_interleave(self.heads // len(keys), 0)
        else:
            queries, keys = (
                None if own is None else own(table).unflatten(-1, (self.heads, -1)).transpose(0, 1)
                for own in (self.query, self.key)
            )
        at = lambda x: x if few else rows_of(x.transpose(0, 1), rows).transpose(0, 1)
        return Vectors(
            query_vectors=at(keys) if C2P in self.pos_att_type else None,
            key_vectors=at(queries) if P2C in self.pos_att_type else None,
            terms=1 + len(self.pos_att_type),
            buckets=buckets,
        )


def deberta_bucket(distance: Tensor, buckets: int, span: int) -> Tensor:
    """The signed bucket of each distance in DeBERTa v2 and v3: exact to ±buckets/2, then the logarithm rounded up.

    Args:
        distance: [n] int64, query position minus key position; the bucket has the same sign.
        buckets: number of buckets on a side; at least 2.
        span: the distance, in tokens, up to which the logarithm tells distances apart.

    Returns:
        [n] int64.

    Raises:
        ValueError: unless buckets ≥ 2 and span > buckets // 2 + 1.
    """
    _check_buckets(buckets, span)
    mid = buckets // 2
    n = distance.abs().clamp(min=mid)
    far = (torch.log(n / mid) / math.log((span - 1) / mid) * (mid - 1)).ceil().long() + mid
    return torch.where(distance.abs() <= mid, distance, far * distance.sign())


def _check_buckets(buckets: int, span: int) -> None:
    if not span - 1 > buckets // 2 >= 1:
        raise ValueError(
            f"buckets is {buckets}, exact to {buckets // 2}, and span {span}; "
            "give buckets ≥ 2 (0 for none) and span > buckets // 2 + 1"
        )

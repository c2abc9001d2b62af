"""Vectors by distance: rows that queries, keys or values meet at the distance between a query and a key."""

import math

import torch
from torch import Tensor, nn

from fastlm.checks import flag, whole
from fastlm.positions import frequencies
from fastlm.positions.base import Position, Projection, Vectors, wide
from fastlm.positions.rows import rows_of


class Shaw(Position, name="shaw"):
    """Learned vectors by distance, met by queries and added to values (Shaw et al. 2018, eq. 3 and 4).

    Its parameters are key [2·reach + 1, head_dim] and value, likewise or None; all heads share them. Keys farther away
    than reach share the last vector of their side.

    Args:
        heads: number of heads.
        head_dim: channels of a head, D.
        reach: the farthest distance with a vector of its own, in tokens; at least 0. Default 16.
        values: whether values get vectors too. Default True.

    Raises:
        ValueError: for a negative reach, and for heads or head_dim below 1.
    """

    per_layer = True

    def __init__(self, heads: int, head_dim: int, reach: int = 16, values: bool = True):
        super().__init__()
        whole(1, heads=heads, head_dim=head_dim)
        whole(0, "give the farthest distance with a vector of its own, ≥ 0", reach=reach)
        flag(values=values)
        self.heads, self.reach = heads, reach
        self.key = nn.Parameter(torch.empty(2 * reach + 1, head_dim))
        self.value = nn.Parameter(torch.empty(2 * reach + 1, head_dim)) if values else None
        self.reset_parameters()

    def vectors(self, distance: Tensor) -> Vectors:
        """distance [n] int64 → query_vectors and value_vectors [heads, n, head_dim]."""
        rows = distance.clamp(-self.reach, self.reach) + self.reach
        key, value = (
            None if t is None else rows_of(t, rows).expand(self.heads, -1, -1) for t in (self.key, self.value)
        )
        return Vectors(query_vectors=key, value_vectors=value)


class TransformerXL(Position, name="transformer-xl"):
    """Relative positions of Transformer-XL (Dai et al. 2019, sec. 3.3): the score is (q + u)·k + (q + v)·W r.

    r is the sinusoid of the distance, all sines first. Its parameters are content_bias (u) and position_bias (v),
    [heads, head_dim], and project.weight (W), [heads · head_dim, dim].

    W r is a torch.mm, whose bits depend on torch's number of threads; `terms` that are made once and used again keep
    theirs.

    Args:
        dim: width of the model, and of r; even.
        heads: number of heads.
        head_dim: channels of a head, D.
        clamp: distances beyond it, in tokens, count as it; 0 for no clamp (where others write -1).

    Raises:
        ValueError: for an odd dim, a negative clamp, and for sizes below 1.
    """

    per_layer = True

    def __init__(self, dim: int, heads: int, head_dim: int, clamp: int = 0):
        super().__init__()
        whole(1, dim=dim, heads=heads, head_dim=head_dim)
        if dim % 2:
            raise ValueError(f"r has a sine and a cosine for each frequency, so dim must be even; got {dim}")
        whole(0, "give the farthest distance told apart, or 0 for no clamp (where others write -1)", clamp=clamp)
        self.clamp = clamp
        self.project = Projection(dim, heads * head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, head_dim))
        self.position_bias = nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def vectors(self, distance: Tensor) -> Vectors:
        """distance [n] int64 → query_vectors [heads, n, head_dim], and the two biases."""
        behind = -distance  # r counts from the query back
        if self.clamp:
            behind = behind.clamp(-self.clamp, self.clamp)
        angles = behind.double()[:, None] * frequencies.geometric(10000.0, self.project.in_features).to(distance.device)
        r = torch.cat((angles.sin(), angles.cos()), -1).to(self.project.weight.dtype)
        rows = self.project(r).unflatten(-1, self.content_bias.shape).transpose(0, 1)
        return Vectors(query_vectors=rows, content_bias=self.content_bias, position_bias=self.position_bias)


class XLNet(TransformerXL):
    """Transformer-XL's positions with relative segments (Yang et al. 2019, sec. 2.5).

    To the score of a query and a key is added (q + s)·E, where E is segment[0] if they are in the same segment and
    segment[1] if not. Only the difference of the two changes probabilities, and `group_bias` adds that:

        attention(q, k, v, position=scheme, group_bias=scheme.group_bias(q, segments))

    XLNet is not a name in SCHEMES, because a model must call `group_bias` itself. The parameters' names in its
    checkpoints:

        segment [2, H, D]            seg_embed
        segment_bias [H, D] (s)      r_s_bias
        content_bias [H, D] (u)      r_w_bias
        position_bias [H, D] (v)     r_r_bias
        project.weight [H·D, dim]    r

    Args:
        dim: width of the model; even.
        heads: number of heads, H.
        head_dim: channels of a head, D.
        clamp: as in `TransformerXL`.

    Raises:
        ValueError: as `TransformerXL`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, clamp: int = 0):
        super().__init__(dim, heads, head_dim, clamp)
        self.segment = nn.Parameter(torch.empty(2, heads, head_dim))
        self.segment_bias = nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def group_bias(self, query: Tensor, segments: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Relative segments, for `attention(group_bias=...)`.

        Args:
            query: [B, H, Lq, D], as attention takes it.
            segments: [B, L] int, or (of queries [B, Lq], of keys [B, Lk]).

        Returns:
            ([B, H, Lq], segments of queries, segments of keys). The numbers are (q + s)·(segment[0] - segment[1]) / √D
            in fp32, or fp64 for queries in fp64.
        """
        of_queries, of_keys = (segments, segments) if isinstance(segments, Tensor) else segments
        query, bias, segment = wide(query), wide(self.segment_bias), wide(self.segment)
        same = ((query + bias[:, None]) * (segment[0] - segment[1])[:, None]).sum(-1) * query.shape[-1] ** -0.5
        return same.to(query.dtype), of_queries, of_keys


class DeBERTa(Position, name="deberta"):
    """Disentangled attention (He et al. 2021, eq. 4): the score is (q·k + q·K(d) + k·Q(d)) / √(3D).

    Both terms take the same d, as the released code does. A table [2·span, dim] of distances (2·buckets with buckets)
    is projected by `key` and `query` to K and Q.

    The rows are torch.mm's, whose bits depend on torch's number of threads; `terms` that are made once and used again
    keep theirs.

    Args:
        dim: width of the model, and of the table.
        heads: number of heads.
        head_dim: channels of a head, D.
        span: the farthest distance told apart, in tokens; at least 1. Default 512.
        buckets: v2 and v3 count distances exactly up to buckets/2 and logarithmically up to span, see
            `deberta_bucket`. Default 0: every distance by itself, as in v1.

    Raises:
        ValueError: for span < 1, and with buckets unless buckets ≥ 2 and span > buckets // 2 + 1.
    """

    per_layer = True

    def __init__(self, dim: int, heads: int, head_dim: int, span: int = 512, buckets: int = 0):
        super().__init__()
        whole(1, dim=dim, heads=heads, head_dim=head_dim)
        whole(1, "give the farthest distance told apart, such as 512", span=span)
        whole(0, "give how many distances are told apart, such as 256, or 0 for v1's", buckets=buckets)
        if buckets:
            _check_deberta(buckets, span)
        self.heads, self.span, self.buckets = heads, span, buckets
        self.table = nn.Parameter(torch.empty(2 * (buckets or span), dim))
        self.key = Projection(dim, heads * head_dim, bias=buckets > 0)
        self.query = Projection(dim, heads * head_dim)
        self.reset_parameters()

    def vectors(self, distance: Tensor) -> Vectors:
        """distance [n] int64 → query_vectors and key_vectors [heads, n, head_dim], with terms=3."""
        behind = -distance
        reach = self.buckets or self.span
        if self.buckets:
            behind = deberta_bucket(behind, self.buckets, self.span)
        rows = (behind + reach).clamp(0, 2 * reach - 1)
        key, query = (
            rows_of(project(self.table), rows).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for project in (self.key, self.query)
        )
        return Vectors(query_vectors=key, key_vectors=query, terms=3)


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
    _check_deberta(buckets, span)
    mid = buckets // 2
    n = distance.abs().clamp(min=mid)
    far = (torch.log(n / mid) / math.log((span - 1) / mid) * (mid - 1)).ceil().long() + mid
    return torch.where(distance.abs() <= mid, distance, far * distance.sign())


def _check_deberta(buckets: int, span: int) -> None:
    if not span - 1 > buckets // 2 >= 1:
        raise ValueError(
            f"buckets is {buckets}, exact to {buckets // 2}, and span {span}; "
            "give buckets ≥ 2 (0 for none) and span > buckets // 2 + 1"
        )

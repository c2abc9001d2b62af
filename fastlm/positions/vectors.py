"""Vectors by distance: rows that queries, keys or values meet at the distance between a query and a key."""

import math

import torch
from torch import Tensor, nn

from fastlm.checks import flag, whole
from fastlm.positions import frequencies
from fastlm.positions.base import Position, Projection, Vectors, wide


class Shaw(Position, name="shaw"):
    """Learned vectors for each distance up to `reach`, met by queries and added to values (Shaw et al. 2018); farther
    keys share the last one. key [2·reach + 1, D], value likewise, or None with values=False; shared by all heads.
    Raises ValueError for a negative reach."""

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
        rows = distance.clamp(-self.reach, self.reach) + self.reach
        of_heads = lambda t: None if t is None else t[rows].expand(self.heads, -1, -1)
        return Vectors(query_vectors=of_heads(self.key), value_vectors=of_heads(self.value))


class TransformerXL(Position, name="transformer-xl"):
    """Relative positions of Transformer-XL (Dai et al. 2019, sec. 3.3): (q + u)·k + (q + v)·W r, r the sinusoid of the
    distance, all sines first. clamp: distances beyond it count as it; 0 for no clamp.

    W r is a torch.mm, whose bits depend on torch's number of threads; `terms` made once and used again have theirs for
    good. Raises ValueError for an odd dim or a negative clamp."""

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
        behind = -distance  # r counts from the query back
        if self.clamp:
            behind = behind.clamp(-self.clamp, self.clamp)
        angles = behind.double()[:, None] * frequencies.geometric(10000.0, self.project.in_features).to(distance.device)
        r = torch.cat((angles.sin(), angles.cos()), -1).to(self.project.weight.dtype)
        rows = self.project(r).unflatten(-1, self.content_bias.shape).transpose(0, 1)
        return Vectors(query_vectors=rows, content_bias=self.content_bias, position_bias=self.position_bias)


class XLNet(TransformerXL):
    """Transformer-XL's positions with relative segments (Yang et al. 2019, sec. 2.5): (q + s)·E more for each key, E =
    segment[0] where its segment is the query's and segment[1] where not. Of the two only their difference changes
    probabilities:

        attention(q, k, v, position=scheme, group_bias=scheme.group_bias(q, segments))

    segment [2, H, D] is `seg_embed`, segment_bias [H, D] `r_s_bias` of its checkpoints, content_bias `r_w_bias`,
    position_bias `r_r_bias`, and project.weight `r` as [heads · head_dim, dim]. Not a name in SCHEMES, for a model must
    call `group_bias`."""

    def __init__(self, dim: int, heads: int, head_dim: int, clamp: int = 0):
        super().__init__(dim, heads, head_dim, clamp)
        self.segment = nn.Parameter(torch.empty(2, heads, head_dim))
        self.segment_bias = nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def group_bias(self, query: Tensor, segments: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, H, Lq, D] as attention takes it; segments [B, L] int, or (of queries [B, Lq], of keys [B, Lk]) →
        what `attention(group_bias=...)` takes, its [B, H, Lq] in fp32 (fp64 for fp64 queries) and times 1/√D."""
        of_queries, of_keys = (segments, segments) if isinstance(segments, Tensor) else segments
        query, bias, segment = wide(query), wide(self.segment_bias), wide(self.segment)
        same = ((query + bias[:, None]) * (segment[0] - segment[1])[:, None]).sum(-1) * query.shape[-1] ** -0.5
        return same.to(query.dtype), of_queries, of_keys


class DeBERTa(Position, name="deberta"):
    """Disentangled attention (He et al. 2021): q·k + q·K(d) + k·Q(d), over √(3D), the same d for both as in the
    released code.

    A table [2·span, dim] of distances, projected to keys and queries of positions. span: distances reach it. buckets:
    v2 and v3 count distances exactly up to buckets/2 and logarithmically up to span (He et al. 2023); 0 for v1.

    The rows are torch.mm's, whose bits depend on torch's number of threads; `terms` made once and used again have
    theirs for good. Raises ValueError for span < 1, and unless it reaches beyond the exact buckets."""

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
        behind = -distance
        reach = self.buckets or self.span
        if self.buckets:
            behind = deberta_bucket(behind, self.buckets, self.span)
        rows = (behind + reach).clamp(0, 2 * reach - 1)
        of_heads = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(0, 1)[:, rows]
        return Vectors(
            query_vectors=of_heads(self.key(self.table)), key_vectors=of_heads(self.query(self.table)), terms=3
        )


def deberta_bucket(distance: Tensor, buckets: int, span: int) -> Tensor:
    """distance [n] int64 → signed bucket [n] int64: exact to ±buckets/2, then the logarithm rounded up."""
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

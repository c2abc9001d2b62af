"""Vectors by distance: rows that queries, keys or values meet at the distance between a query and a key."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import below_one, flag, whole
from fastlm.positions import frequencies
from fastlm.positions.base import Position, Projection, Vectors, wide
from fastlm.positions.rows import buckets_of, rows_of
from fastlm.positions.shared import LayerPosition, Project, SharedPart


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
        """distance [n] int64 → query_vectors and value_vectors [heads, n or buckets, head_dim]."""
        rows, buckets = buckets_of(distance.clamp(-self.reach, self.reach) + self.reach)
        key, value = (
            None if t is None else rows_of(t, rows).expand(self.heads, -1, -1) for t in (self.key, self.value)
        )
        return Vectors(query_vectors=key, value_vectors=value, buckets=buckets)


class DistanceSines(SharedPart):
    """Transformer-XL's r, and its two biases where layers share them: distance [n] int64 → (r [n, dim], u, v).

    r is the sinusoid of the distance, all sines first. Its parameters are content_bias (u) and position_bias (v),
    [heads, head_dim]; with untie there are none, and u and v are None.

    Args:
        dim, heads, head_dim, clamp, untie: as in `TransformerXL`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, clamp: int = 0, untie: bool = False):
        super().__init__()
        whole(1, dim=dim, heads=heads, head_dim=head_dim)
        if dim % 2:
            raise ValueError(f"r has a sine and a cosine for each frequency, so dim must be even; got {dim}")
        whole(0, "give the farthest distance told apart, or 0 for no clamp (where others write -1)", clamp=clamp)
        flag(untie=untie)
        self.dim, self.clamp = dim, clamp
        self.content_bias = None if untie else nn.Parameter(torch.empty(heads, head_dim))
        self.position_bias = None if untie else nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def forward(self, distance: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        behind = -distance  # r counts from the query back
        if self.clamp:
            behind = behind.clamp(-self.clamp, self.clamp)
        angles = behind.double()[:, None] * frequencies.geometric(10000.0, self.dim).to(distance.device)
        return torch.cat((angles.sin(), angles.cos()), -1), self.content_bias, self.position_bias


class TransformerXL(LayerPosition, name="transformer-xl"):
    """Relative positions of Transformer-XL (Dai et al. 2019, sec. 3.3): the score is (q + u)·k + (q + v)·W r.

    r is the sinusoid of the distance, all sines first. Its parameters are content_bias (u) and position_bias (v),
    [heads, head_dim], and project.weight (W), [heads · head_dim, dim]. The layers of a model share u and v.

    W r is a torch.mm, whose bits depend on torch's number of threads; `terms` that are made once and used again keep
    theirs.

    Args:
        dim: width of the model, and of r; even.
        heads: number of heads.
        head_dim: channels of a head, D.
        clamp: distances beyond it, in tokens, count as it; 0 for no clamp (where others write -1).
        untie: whether each layer of a model has a u and a v of its own (others' untie_r). Default False.
        dropout: share of r that each layer drops while training, in [0, 1). Default 0.
        shared: whether r is a stack's `DistanceSines`, as are u and v unless untie. Default False.

    Raises:
        ValueError: for an odd dim, a negative clamp, and for sizes below 1.
    """

    part = DistanceSines

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        clamp: int = 0,
        untie: bool = False,
        dropout: float = 0.0,
        shared: bool = False,
    ):
        super().__init__()
        sines = DistanceSines(dim, heads, head_dim, clamp, untie=True)
        flag(untie=untie, shared=shared)
        below_one(dropout=dropout)
        self.sines, self.dropout = None if shared else sines, dropout
        own = untie or not shared
        self.project = Projection(dim, heads * head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, head_dim)) if own else None
        self.position_bias = nn.Parameter(torch.empty(heads, head_dim)) if own else None
        self.heads = heads
        self.reset_parameters()

    def own_part(self) -> SharedPart | None:
        return self.sines

    def complete(self, part: tuple, distance: Tensor, project: Project | None = None) -> Vectors:
        """query_vectors [heads, n, head_dim], and the two biases."""
        r, u, v = part
        r = F.dropout(r.to(self.project.weight.dtype), self.dropout, self.training)
        rows = self.project(r).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        if self.content_bias is not None:
            u, v = self.content_bias, self.position_bias
        return Vectors(query_vectors=rows, content_bias=u, position_bias=v)


class _Segments:
    """The parameters of relative segments, and what they add to scores, for a module that has them."""

    def _add_segments(self, heads: int, head_dim: int) -> None:
        self.segment = nn.Parameter(torch.empty(2, heads, head_dim))
        self.segment_bias = nn.Parameter(torch.empty(heads, head_dim))
        Position.reset_parameters(self)

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


class RelativeSegments(_Segments, nn.Module):
    """XLNet's relative segments, whatever the scheme of positions (Yang et al. 2019, sec. 2.5).

    To the score of a query and a key is added (q + s)·E, where E is segment[0] if they are in the same segment and
    segment[1] if not. Its parameters are segment [2, heads, head_dim] and segment_bias (s) [heads, head_dim].

    Args:
        heads: number of heads.
        head_dim: channels of a head.
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        whole(1, heads=heads, head_dim=head_dim)
        self._add_segments(heads, head_dim)


class XLNet(_Segments, TransformerXL):
    """Transformer-XL's positions with relative segments (Yang et al. 2019, sec. 2.5).

    To the score of a query and a key is added (q + s)·E, where E is segment[0] if they are in the same segment and
    segment[1] if not. Only the difference of the two changes probabilities, and `group_bias` adds that:

        attention(q, k, v, position=scheme, group_bias=scheme.group_bias(q, segments))

    XLNet is not a name in SCHEMES, because a model must call `group_bias` itself: those of fastlm.models have
    `RelativeSegments` beside whatever scheme. The parameters' names in its
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
        options: clamp, untie, dropout and shared, as in `TransformerXL`.

    Raises:
        ValueError: as `TransformerXL`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, **options):
        super().__init__(dim, heads, head_dim, **options)
        self._add_segments(heads, head_dim)

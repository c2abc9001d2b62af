"""Every positional scheme is one small class here, and nothing else in fastlm knows their names.

A scheme says where it acts by the method it overrides:

    embed(positions)     [L] → [L, dim]       added to the token embeddings (learned, sinusoidal)
    angles(positions)    [L] → [L, R/2]       rotation of q and k (RoPE), angles in fp64; cos and sin times `magnitude`
    bias(distance)       [n] → [H, n]         added to scores as a function of d = key - query position (ALiBi, T5, KERPLE)
    vectors(distance)    [n] → Vectors        met by queries, keys or probabilities at that distance (Shaw, Transformer-XL, DeBERTa)

`bias` and `vectors` are a few lines of PyTorch: kernels take their values, one row per distance, and return the rows'
gradients, and autograd carries those on to whatever parameters made them. To add a scheme, subclass `Position` with a
name, here or in your own code:

    class Mine(Position, name="mine"):
        def __init__(self, heads): ...
        def bias(self, distance): ...

What a scheme learns starts as `reset_parameters` draws it, so that it can be made on the meta device and filled later. The
constructor's argument names say which facts of a model it wants, out of FACTS. Models, the command line, tests and
benchmarks find it in SCHEMES.
"""

import inspect
import math
from itertools import chain
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastlm import frequencies
from fastlm.frequencies import Scaling
from fastlm.ops.rotary import LAYOUTS

SCHEMES: dict[str, type["Position"]] = {}
FACTS = ("dim", "heads", "head_dim", "context", "causal")


class Vectors(NamedTuple):
    """Rows by distance, each [H, n, D] or None: what q meets, what k meets, what is added to v (fastlm/ops/attention.py).

    content_bias, position_bias [H, D]: added to the queries that meet keys, and to those that meet query_vectors. terms:
    how many products make a score, for a scale of 1/√(terms · D).
    """

    query_vectors: Tensor | None = None
    key_vectors: Tensor | None = None
    value_vectors: Tensor | None = None
    content_bias: Tensor | None = None
    position_bias: Tensor | None = None
    terms: int = 1


class Terms(NamedTuple):
    """What a scheme contributes to attention calls of one size; make once, use in every layer that shares the scheme.

    rotate_q, rotate_k: (cos, sin) each [L, R/2], for `fastlm.rotate`; None for no rotation. layout: see there.
    table: [H, Lq + Lk - 1] over distances, None for no bias. All fp32, or fp64 where that was asked for.
    """

    rotate_q: tuple[Tensor, Tensor] | None = None
    rotate_k: tuple[Tensor, Tensor] | None = None
    layout: str = "half"
    table: Tensor | None = None
    vectors: Vectors = Vectors()


class Position(nn.Module):
    """A positional scheme; see the top of this file. Override one or more of `embed`, `angles`, `bias`, `vectors`.

    per_layer: whether each layer of a model has a scheme of its own, with its own parameters, as the paper has it.
    """

    name: ClassVar[str]
    per_layer: ClassVar[bool] = False
    layout: str = "half"
    magnitude: float = 1.0

    def __init_subclass__(cls, name: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is None:  # a relative of a scheme, for its author's own use
            return
        if name in SCHEMES and (SCHEMES[name].__module__, SCHEMES[name].__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a scheme named {name!r} exists already: {SCHEMES[name].__module__}.{SCHEMES[name].__qualname__}; choose another name")
        unknown = set(inspect.signature(cls).parameters) - set(FACTS) - _optional(cls)
        if unknown:
            raise TypeError(f"{cls.__name__} asks for {sorted(unknown)} without a default; a model knows {', '.join(FACTS)}")
        cls.name = name
        SCHEMES[name] = cls

    def embed(self, positions: Tensor) -> Tensor | None:
        """positions [L], or [B, L] where they differ by row (`masks.positions_of`) → [..., L, dim] to add to token embeddings, or None."""
        return None

    def angles(self, positions: Tensor) -> Tensor | None:
        """positions [L] fp64 → angles [L, R/2] fp64 in radians, or None."""
        return None

    def bias(self, distance: Tensor) -> Tensor | None:
        """distance [n] int64, key position minus query position → [H, n] floats, or None."""
        return None

    def vectors(self, distance: Tensor) -> Vectors:
        """distance [n] int64, key position minus query position → rows for each."""
        return Vectors()

    def reset_parameters(self) -> None:
        """Draw the scheme's own parameters anew, those of submodules aside: N(0, 0.02), and zero where the name ends in bias."""
        for name, p in self.named_parameters(recurse=False):
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)

    @classmethod
    def embeds(cls) -> bool:
        """Whether the scheme acts on embeddings, which a model adds and attention alone cannot."""
        return cls.embed is not Position.embed

    def terms(
        self, Lq: int, Lk: int, offset: int | None = None, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Terms:
        """The rotation and the distance table for queries at positions offset … offset + Lq - 1 and keys at 0 … Lk - 1.

        offset: Lk - Lq unless given, so that the last query stands at the last key. device: where the scheme's parameters and
        constants are unless given. dtype: of the rotation and the table; fp64 for queries in fp64.
        """
        offset = Lk - Lq if offset is None else offset
        device = next((x.device for x in chain(self.parameters(), self.buffers())), None) if device is None else device
        keys = torch.arange(Lk, device=device)
        queries = torch.arange(offset, offset + Lq, device=device)
        rotate_k = self._rotation(keys, dtype)
        rotate_q = rotate_k if (Lq, offset) == (Lk, 0) else self._rotation(queries, dtype)
        distance = torch.arange(-(Lq - 1) - offset, Lk - offset, device=device)
        table = self.bias(distance)
        return Terms(rotate_q, rotate_k, self.layout, None if table is None else table.to(dtype), self.vectors(distance))

    def _apply(self, fn, recurse=True):
        """Follow the module to a device, but keep constants in their own dtype when a model is cast to 16 bits, and their numbers
        where it goes to the meta device or comes from there empty."""
        constants = {name: self._buffers[name] for name in self._non_persistent_buffers_set}
        super()._apply(fn, recurse)
        for name, constant in constants.items():
            device = self._buffers[name].device
            self._buffers[name] = constant if device.type == "meta" else constant.to(device)
        return self

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        angles = self.angles(positions.double())
        return None if angles is None else ((self.magnitude * angles.cos()).to(dtype), (self.magnitude * angles.sin()).to(dtype))


def constants_device() -> torch.device:
    """Where modules are being made, and a context that makes tensors there; the CPU if that is meta, which would lose their numbers."""
    default = torch.empty(0).device
    return torch.device("cpu") if default.type == "meta" else default


class Projection(nn.Linear):
    """A linear layer drawn from N(0, 0.02), its bias zero."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def _optional(cls: type) -> set[str]:
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n for n, p in inspect.signature(cls).parameters.items() if p.default is not p.empty or p.kind in free}


def make(name: str, **facts) -> Position:
    """Build the scheme called `name` for a model with these FACTS. Raises ValueError for a name nobody registered."""
    if name not in SCHEMES:
        raise ValueError(f"position {name!r} is unknown; choose from {', '.join(sorted(SCHEMES))}")
    wanted = inspect.signature(SCHEMES[name]).parameters
    return SCHEMES[name](**{fact: value for fact, value in facts.items() if fact in wanted})


class NoPosition(Position, name="none"):
    """No position information besides the causal mask (NoPE; Kazemnejad et al. 2023)."""


class Learned(Position, name="learned"):
    """A learned vector for each absolute position (GPT-2, BERT). Positions past `context` raise IndexError."""

    def __init__(self, context: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context, dim))
        self.reset_parameters()

    def embed(self, positions: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        if positions.ndim == 1 and len(positions) > rows:  # shapes only: reading a value would wait for the device
            raise IndexError(f"{len(positions)} positions, but the model learned {rows}; use a scheme that extrapolates, such as alibi")
        return self.weight[positions]


class Sinusoidal(Position, name="sinusoidal"):
    """Fixed sines and cosines, interleaved: PE(p, 2i) = sin(p / 10000^(2i/dim)), PE(p, 2i+1) = cos (Vaswani et al. 2017).
    Angles are fp64, what is added is fp32."""

    def __init__(self, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"sinusoidal positions pair channels, so dim must be even; got {dim}")
        self.dim = dim

    def embed(self, positions: Tensor) -> Tensor:
        angles = positions.double()[..., None] * frequencies.geometric(10000.0, self.dim).to(positions.device)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).float()


class RoPE(Position, name="rope"):
    """Rotary embedding (Su et al. 2021): q and k turn by position · base^(-2i/R), so scores see only differences.

    layout: "half" (NeoX, Llama), "interleaved" (the paper, GPT-J), or "proportional" (Gemma: pairs i with i + D/2 and
    frequencies of the whole head, of which the first `fraction` turn). fraction: the share of channels that turn (partial
    rotary). scaling: see fastlm/frequencies.py. Raises ValueError when fraction is no share or the turning channels do not pair up.
    """

    def __init__(
        self, head_dim: int, base: float = 10000.0, layout: str = "half", fraction: float = 1.0, scaling: Scaling = frequencies.unscaled
    ):
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"RoPE's fraction is {fraction}; give the share of channels that turn, in (0, 1]")
        rotated = int(head_dim * fraction)
        if rotated % 2 or rotated == 0:
            raise ValueError(f"RoPE turns pairs of channels: head_dim {head_dim} × fraction {fraction} must be even and positive")
        if layout not in (*LAYOUTS, "proportional"):
            raise ValueError(f"RoPE layout {layout!r} is unknown; choose from {', '.join(LAYOUTS)}, proportional")
        proportional = layout == "proportional"
        self.layout = "half" if proportional else layout
        with constants_device():
            pitch, self.magnitude = scaling(base, head_dim if proportional else rotated)
        if proportional:
            pitch[rotated // 2 :] = 0
        self.register_buffer("pitch", pitch, persistent=False)

    def angles(self, positions: Tensor) -> Tensor:
        return positions[:, None] * self.pitch.to(positions.device)  # a meta model's is not there


class ALiBi(Position, name="alibi"):
    """Attention with linear biases (Press et al. 2022): -slope · |distance|, not scaled by 1/√D.

    Slopes are 2^(-8h/n) for n a power of two, filled up from the next power otherwise; learned=True trains them.
    """

    def __init__(self, heads: int, learned: bool = False):
        super().__init__()
        if heads < 1:
            raise ValueError(f"ALiBi has a slope for each head; got heads {heads}, give at least 1")
        if learned:
            self.slopes = nn.Parameter(torch.empty(heads))
            self.reset_parameters()
        else:
            with constants_device():
                self.register_buffer("slopes", alibi_slopes(heads), persistent=False)

    def reset_parameters(self) -> None:
        if isinstance(self.slopes, nn.Parameter):
            with torch.no_grad():  # counting by a sum works on a sharded tensor too
                self.slopes.copy_(_slopes(torch.ones_like(self.slopes, dtype=torch.float64).cumsum(0), len(self.slopes)))

    def bias(self, distance: Tensor) -> Tensor:
        return -_wide(self.slopes.to(distance.device))[:, None] * distance.abs()  # bf16 would round distances beyond 256


class T5Bias(Position, name="t5"):
    """A learned bias per head and bucket of distance (Raffel et al. 2020): exact near by, logarithmic to max_distance.

    weight [buckets, heads] as in T5 checkpoints. causal spends every bucket on keys before the query; otherwise half
    of them serve keys after it. Raises ValueError unless max_distance is beyond the exact buckets, half of a side's, of which
    there is one at least.
    """

    def __init__(self, heads: int, causal: bool = True, buckets: int = 32, max_distance: int = 128):
        super().__init__()
        _check_t5(causal, buckets, max_distance)
        self.causal, self.max_distance = causal, max_distance
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.reset_parameters()

    def bias(self, distance: Tensor) -> Tensor:
        return self.weight[t5_bucket(distance, self.causal, self.weight.shape[0], self.max_distance)].T


class Kerple(Position, name="kerple"):
    """Kernelised relative bias, logarithmic form (Chi et al. 2022, eq. 5): -r₁ · log(1 + r₂ · |distance|), r₁, r₂ > 0 learned."""

    def __init__(self, heads: int):
        super().__init__()
        self.r1 = nn.Parameter(torch.empty(heads))
        self.r2 = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.r1, 0, 2)
        nn.init.uniform_(self.r2, 0, 1)

    def bias(self, distance: Tensor) -> Tensor:
        r1, r2 = (_wide(r).clamp(min=1e-2)[:, None] for r in (self.r1, self.r2))
        return -r1 * torch.log1p(r2 * distance.abs())


class Shaw(Position, name="shaw"):
    """Learned vectors for each distance up to `reach`, met by queries and added to values (Shaw et al. 2018); farther
    keys share the last one. key [2·reach + 1, D], value likewise, or None with values=False; shared by all heads.
    Raises ValueError for a negative reach."""

    per_layer = True

    def __init__(self, heads: int, head_dim: int, reach: int = 16, values: bool = True):
        super().__init__()
        if reach < 0:
            raise ValueError(f"Shaw's reach is {reach}; give the farthest distance with a vector of its own, ≥ 0")
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

    W r is a torch.mm, whose bits depend on torch's number of threads; `terms` made once and used again have theirs for good.
    Raises ValueError for an odd dim or a negative clamp.
    """

    per_layer = True

    def __init__(self, dim: int, heads: int, head_dim: int, clamp: int = 0):
        super().__init__()
        if dim % 2:
            raise ValueError(f"r has a sine and a cosine for each frequency, so dim must be even; got {dim}")
        if clamp < 0:
            raise ValueError(f"clamp is {clamp}; give the farthest distance told apart, or 0 for no clamp (where others write -1)")
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
    """Transformer-XL's positions with relative segments (Yang et al. 2019, sec. 2.5): (q + s)·E more for each key, E = segment[0]
    where its segment is the query's and segment[1] where not. Of the two only their difference changes probabilities:

        attention(q, k, v, position=scheme, group_bias=scheme.group_bias(q, segments))

    segment [2, H, D] is `seg_embed`, segment_bias [H, D] `r_s_bias` of its checkpoints, content_bias `r_w_bias`, position_bias
    `r_r_bias`, and project.weight `r` as [heads · head_dim, dim]. Not a name in SCHEMES, for a model must call `group_bias`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, clamp: int = 0):
        super().__init__(dim, heads, head_dim, clamp)
        self.segment = nn.Parameter(torch.empty(2, heads, head_dim))
        self.segment_bias = nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def group_bias(self, query: Tensor, segments: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, H, Lq, D] as attention takes it; segments [B, L] int, or (of queries [B, Lq], of keys [B, Lk]) → what
        `attention(group_bias=...)` takes, its [B, H, Lq] in fp32 (fp64 for fp64 queries) and times 1/√D."""
        of_queries, of_keys = (segments, segments) if isinstance(segments, Tensor) else segments
        query, bias, segment = _wide(query), _wide(self.segment_bias), _wide(self.segment)
        same = ((query + bias[:, None]) * (segment[0] - segment[1])[:, None]).sum(-1) * query.shape[-1] ** -0.5
        return same.to(query.dtype), of_queries, of_keys


class DeBERTa(Position, name="deberta"):
    """Disentangled attention (He et al. 2021): q·k + q·K(d) + k·Q(d), over √(3D), the same d for both as in the released code.

    A table [2·span, dim] of distances, projected to keys and queries of positions. span: distances reach it. buckets: v2
    and v3 count distances exactly up to buckets/2 and logarithmically up to span (He et al. 2023); 0 for v1.

    The rows are torch.mm's, whose bits depend on torch's number of threads; `terms` made once and used again have theirs for
    good. Raises ValueError for span < 1, and unless it reaches beyond the exact buckets.
    """

    per_layer = True

    def __init__(self, dim: int, heads: int, head_dim: int, span: int = 512, buckets: int = 0):
        super().__init__()
        if span < 1:
            raise ValueError(f"span is {span}; give the farthest distance told apart, such as 512")
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
        return Vectors(query_vectors=of_heads(self.key(self.table)), key_vectors=of_heads(self.query(self.table)), terms=3)


def deberta_bucket(distance: Tensor, buckets: int, span: int) -> Tensor:
    """distance [n] int64 → signed bucket [n] int64: exact to ±buckets/2, then the logarithm rounded up."""
    _check_deberta(buckets, span)
    mid = buckets // 2
    n = distance.abs().clamp(min=mid)
    far = (torch.log(n / mid) / math.log((span - 1) / mid) * (mid - 1)).ceil().long() + mid
    return torch.where(distance.abs() <= mid, distance, far * distance.sign())


def _check_deberta(buckets: int, span: int) -> None:
    if not span - 1 > buckets // 2 >= 1:
        raise ValueError(f"buckets is {buckets}, exact to {buckets // 2}, and span {span}; give buckets ≥ 2 (0 for none) and span > buckets // 2 + 1")


def alibi_slopes(heads: int) -> Tensor:
    """[heads] fp32. For n = 2^k heads: 2^(-8h/n), h = 1 … n; else those of the power below, then every second of the next."""
    return _slopes(torch.arange(1, heads + 1, dtype=torch.float64), heads).float()


def _slopes(h: Tensor, heads: int) -> Tensor:
    """The slopes of the heads with these numbers, h [n] fp64 from 1 on."""
    power = 2 ** (heads.bit_length() - 1)
    return torch.where(h <= power, 2.0 ** (-8 * h / power), 2.0 ** (-4 * (2 * (h - power) - 1) / power))


def t5_bucket(distance: Tensor, causal: bool, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """distance [n] int64, key minus query → bucket [n] int64. The logarithm is fp32: its rounding sets the bin edges."""
    _check_t5(causal, buckets, max_distance)
    if causal:
        first, n = torch.zeros_like(distance), (-distance).clamp(min=0)
    else:
        buckets //= 2
        first, n = (distance > 0) * buckets, distance.abs()
    exact = buckets // 2
    log_ratio = torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (log_ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(n < exact, n, far)


def _check_t5(causal: bool, buckets: int, max_distance: int) -> None:
    parts = 2 if causal else 4
    if not max_distance > buckets // parts >= 1:
        raise ValueError(
            f"buckets is {buckets}, of which {buckets // parts} are exact, and max_distance {max_distance}; "
            f"give buckets ≥ {parts} and max_distance > buckets // {parts}"
        )


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

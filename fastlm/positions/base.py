"""What a positional scheme is: the class every scheme derives from, and the registry where models find it by its name.

A scheme says where it acts by the method it overrides:

    embed(positions)     [L] → [L, dim]       added to the token embeddings (learned, sinusoidal)
    angles(positions)    [L] → [L, R/2]       rotation of q and k (RoPE), angles in fp64; cos and sin times `magnitude`
    bias(distance)       [n] → [H, n]         added to scores by d = key - query position (ALiBi, T5, KERPLE)
    vectors(distance)    [n] → Vectors        met there by queries, keys, probabilities (Shaw, Transformer-XL, DeBERTa)

`bias` and `vectors` are a few lines of PyTorch: kernels take their values, one row per distance, and return the rows'
gradients, and autograd carries those on to whatever parameters made them.

What a scheme learns starts as `reset_parameters` draws it, so that it can be made on the meta device and filled later.
The constructor's argument names say which facts of a model it wants, out of FACTS."""

import inspect
from itertools import chain
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastlm.checks import did_you_mean

SCHEMES: dict[str, type["Position"]] = {}
FACTS = ("dim", "heads", "head_dim", "context", "causal")
ACTS = ("embed", "angles", "bias", "vectors")
FREE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Vectors(NamedTuple):
    """Rows by distance, each [H, n, D] or None: what q meets, what k meets, what is added to v
    (fastlm/ops/attention.py).

    content_bias, position_bias [H, D]: added to the queries that meet keys, and to those that meet query_vectors.
    terms: how many products make a score, for a scale of 1/√(terms · D)."""

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
    size: (Lq, Lk, offset) of the calls they fit; head_dim: the channels of a head there. Attention refuses others,
    where these are not None. causal: whether they tell no keys after the query apart."""

    rotate_q: tuple[Tensor, Tensor] | None = None
    rotate_k: tuple[Tensor, Tensor] | None = None
    layout: str = "half"
    table: Tensor | None = None
    vectors: Vectors = Vectors()
    size: tuple[int, int, int] | None = None
    head_dim: int | None = None
    causal: bool = False


class Position(nn.Module):
    """A positional scheme; see the top of this file. Override one or more of `embed`, `angles`, `bias`, `vectors`.

    per_layer: whether each layer of a model has a scheme of its own, with its own parameters, as the paper has it.
    head_dim: the channels of a head that its angles are for, None for any. causal: whether it was made for keys up to
    the query and does not tell later ones apart; attention warns where it sees them."""

    name: ClassVar[str]
    per_layer: ClassVar[bool] = False
    layout: str = "half"
    magnitude: float = 1.0
    head_dim: int | None = None
    causal: bool = False

    def __init_subclass__(cls, name: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is None:  # a relative of a scheme, for its author's own use
            return
        place = lambda scheme: f"{scheme.__module__}.{scheme.__qualname__}"
        if name in SCHEMES and place(SCHEMES[name]) != place(cls):
            raise ValueError(f"a scheme named {name!r} exists already: {place(SCHEMES[name])}; choose another name")
        unknown = set(inspect.signature(cls).parameters) - set(FACTS) - _optional(cls)
        if unknown:
            raise TypeError(
                f"{cls.__name__} asks for {sorted(unknown)} without a default; a model knows {', '.join(FACTS)}"
            )
        cls.check_acts()
        cls.name = name
        SCHEMES[name] = cls

    def embed(self, positions: Tensor) -> Tensor | None:
        """positions [L], or [B, L] where they differ by row (`masks.positions_of`) → [..., L, dim] to add to token
        embeddings, or None."""
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
        """Draw the scheme's own parameters anew, those of submodules aside: N(0, 0.02), and zero where the name ends in
        bias."""
        for name, p in self.named_parameters(recurse=False):
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)

    @classmethod
    def embeds(cls) -> bool:
        """Whether the scheme acts on embeddings, which a model adds and attention alone cannot."""
        return cls.embed is not Position.embed

    @classmethod
    def check_acts(cls) -> None:
        """Raise TypeError for a scheme that overrides no method of ACTS, and so would train as no position at all."""
        if any(getattr(cls, method) is not getattr(Position, method) for method in ACTS):
            return
        near = (f", but {mine}{meant}" for mine in vars(cls) if (meant := did_you_mean(mine, ACTS)))
        raise TypeError(
            f"{cls.__name__} defines none of {', '.join(ACTS)}, by which schemes act{next(near, '; define one')}"
        )

    def terms(
        self,
        Lq: int,
        Lk: int,
        offset: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Terms:
        """The rotation and the distance table for queries at positions offset … offset + Lq - 1 and keys at 0 … Lk - 1.

        offset: Lk - Lq unless given, so that the last query stands at the last key. device: where the scheme's
        parameters and constants are unless given. dtype: of the rotation and the table; fp64 for queries in fp64."""
        self.check_acts()
        offset = Lk - Lq if offset is None else offset
        device = next((x.device for x in chain(self.parameters(), self.buffers())), None) if device is None else device
        keys = torch.arange(Lk, device=device)
        queries = torch.arange(offset, offset + Lq, device=device)
        rotate_k = self._rotation(keys, dtype)
        rotate_q = rotate_k if (Lq, offset) == (Lk, 0) else self._rotation(queries, dtype)
        distance = torch.arange(-(Lq - 1) - offset, Lk - offset, device=device)
        table = self.bias(distance)
        return Terms(
            rotate_q, rotate_k, self.layout, None if table is None else table.to(dtype), self.vectors(distance),
            size=(Lq, Lk, offset), head_dim=self.head_dim, causal=self.causal,
        )  # fmt: skip

    def _apply(self, fn, recurse=True):
        """Follow the module to a device, but keep constants in their own dtype when a model is cast to 16 bits, and
        their numbers where it goes to the meta device or comes from there empty."""
        constants = {name: self._buffers[name] for name in self._non_persistent_buffers_set}
        super()._apply(fn, recurse)
        for name, constant in constants.items():
            device = self._buffers[name].device
            self._buffers[name] = constant if device.type == "meta" else constant.to(device)
        return self

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        angles = self.angles(positions.double())
        return (
            None
            if angles is None
            else ((self.magnitude * angles.cos()).to(dtype), (self.magnitude * angles.sin()).to(dtype))
        )


def _optional(cls: type) -> set[str]:
    return {n for n, p in inspect.signature(cls).parameters.items() if p.default is not p.empty or p.kind in FREE}


def make(name: str, **facts) -> Position:
    """Build the scheme called `name` for a model with these FACTS, of which it takes those it wants; what else its
    constructor takes may be given too. Raises ValueError for a name nobody registered, TypeError for other arguments
    and for facts that the scheme wants and are not given."""
    if name not in SCHEMES:
        raise ValueError(f"position {name!r} is unknown; choose from {', '.join(sorted(SCHEMES))}")
    scheme = SCHEMES[name]
    wanted = [n for n, p in inspect.signature(scheme).parameters.items() if p.kind not in FREE]
    for other in facts.keys() - set(wanted) - set(FACTS):
        raise TypeError(
            f"position {name!r} takes no {other}{did_you_mean(other, wanted)}; it takes {', '.join(wanted)}"
        )
    for missing in sorted(set(wanted) - facts.keys() - _optional(scheme)):
        raise TypeError(f"position {name!r} wants the model's {missing}; give {missing}=")
    return scheme(**{fact: value for fact, value in facts.items() if fact in wanted})


class Projection(nn.Linear):
    """A linear layer drawn from N(0, 0.02), its bias zero."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def constants_device() -> torch.device:
    """Where modules are being made, and a context that makes tensors there; the CPU if that is meta, which would lose
    their numbers."""
    default = torch.empty(0).device
    return torch.device("cpu") if default.type == "meta" else default


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

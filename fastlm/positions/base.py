"""What a positional scheme is: the class every scheme derives from, and the registry where models find it by its name.

A scheme says where it acts by the method it overrides:

    embed(positions)     [L] → [L, dim]       added to the token embeddings (learned, sinusoidal)
    angles(positions)    [L] → [L, R/2]       rotation of q and k (RoPE), angles in fp64; cos and sin times `magnitude`
    bias(distance)       [n] → [H, n]         added to scores by d = key - query position (ALiBi, T5, KERPLE)
    vectors(distance)    [n] → Vectors        met there by queries, keys, probabilities (Shaw, Transformer-XL, DeBERTa)

`bias` and `vectors` are a few lines of PyTorch. Kernels take their values, one row per distance, and return the rows'
gradients; autograd carries those on to the parameters that made them.

Parameters start as `reset_parameters` draws them, so a scheme can be made on the meta device and filled later. The
names of the constructor's arguments say which facts of a model it wants, out of FACTS.
"""

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
    """Rows for n distances, Lq + Lk - 1 in a call, as in the formula of fastlm/ops/attention.py: floats, or None.

    Args:
        query_vectors: [H, n, D]; the score of a query and a key gains query · the row of their distance.
        key_vectors: [H, n, D]; the score gains key · the row.
        value_vectors: [H, n, D]; the row is added to the value, so outputs gain the rows weighted by the probabilities.
        content_bias: [H, D], added to the queries that meet keys (u in Transformer-XL).
        position_bias: [H, D], added to the queries that meet query_vectors (v in Transformer-XL).
        terms: how many products make a score; attention's scale is then 1/√(terms · D). Default 1.
        buckets: [n] int, the row of each distance, rising from 0 on by 0 or 1; rows are then [H, buckets, D].
    """

    query_vectors: Tensor | None = None
    key_vectors: Tensor | None = None
    value_vectors: Tensor | None = None
    content_bias: Tensor | None = None
    position_bias: Tensor | None = None
    terms: int = 1
    buckets: Tensor | None = None


class Terms(NamedTuple):
    """A scheme's part in attention calls of one size. `Position.terms` makes it once for all layers that share it.

    Args:
        rotate_q: (cos, sin) for `fastlm.rotate` on queries, each [Lq, R/2]; None for no rotation.
        rotate_k: (cos, sin) for keys, each [Lk, R/2]; None for no rotation.
        layout: which channels pair up, as in `fastlm.rotate`. Default "half".
        table: [H, Lq + Lk - 1], the bias of each distance; None for none.
        vectors: `Vectors` of the same distances; default none.
        size: (Lq, Lk, offset) of the calls that these terms fit; None for any.
        head_dim: channels of a head that they fit; None for any.
        causal: whether they give all keys after the query one distance.

    Rotation and table are fp32, or fp64 where that was asked for. Attention refuses calls of another size or head_dim.
    """

    rotate_q: tuple[Tensor, Tensor] | None = None
    rotate_k: tuple[Tensor, Tensor] | None = None
    layout: str = "half"
    table: Tensor | None = None
    vectors: Vectors = Vectors()
    size: tuple[int, int, int] | None = None
    head_dim: int | None = None
    causal: bool = False


class Position(nn.Module):
    """A positional scheme. To write one, subclass it with a name and override `embed`, `angles`, `bias` or `vectors`.

    Attributes:
        name: the scheme's name in SCHEMES.
        per_layer: whether each layer of a model has its own copy with its own parameters, as in the scheme's paper.
        layout: which channels `angles` turns together, as in `fastlm.rotate`.
        magnitude: factor of cos and sin (YaRN's attention factor); 1 by default.
        head_dim: channels of a head that the angles are for; None for any.
        causal: whether it was made for keys up to the query and does not tell later ones apart. Attention warns
            where it sees later keys.

    Raises, when a subclass with a name is defined:
        ValueError: for a name that another class has.
        TypeError: for constructor arguments without a default that are not in FACTS, and for a class that overrides
            none of the four methods.
    """

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
        taken = SCHEMES.get(name)
        if taken is not None and _qualified(taken) != _qualified(cls):
            raise ValueError(f"a scheme named {name!r} exists already: {_qualified(taken)}; choose another name")
        unknown = set(inspect.signature(cls).parameters) - set(FACTS) - _optional(cls)
        if unknown:
            raise TypeError(
                f"{cls.__name__} asks for {sorted(unknown)} without a default; a model knows {', '.join(FACTS)}"
            )
        cls.check_acts()
        cls.name = name
        SCHEMES[name] = cls

    def embed(self, positions: Tensor) -> Tensor | None:
        """What to add to the token embeddings.

        Args:
            positions: [L] int64, or [B, L] where rows differ (`masks.position_ids`).

        Returns:
            [..., L, dim] floats, or None for nothing.
        """
        return None

    def angles(self, positions: Tensor) -> Tensor | None:
        """By how much queries and keys turn.

        Args:
            positions: [L] fp64.

        Returns:
            [L, R/2] fp64 in radians, an angle for each pair of the R channels that turn; None for no rotation.
        """
        return None

    def bias(self, distance: Tensor) -> Tensor | None:
        """What to add to the scores, after scaling.

        Args:
            distance: [n] int64, key position minus query position.

        Returns:
            [H, n] floats, a number for each head and distance; None for nothing.
        """
        return None

    def vectors(self, distance: Tensor) -> Vectors:
        """Vectors that queries, keys and values meet, by distance.

        Args:
            distance: [n] int64, key position minus query position.

        Returns:
            `Vectors` whose rows belong to these distances; empty by default.
        """
        return Vectors()

    def reset_parameters(self) -> None:
        """Draw the scheme's own parameters anew, not those of its submodules.

        They are normal with standard deviation 0.02, and zero where the name ends in "bias".
        """
        for name, p in self.named_parameters(recurse=False):
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)

    @classmethod
    def embeds(cls) -> bool:
        """Whether the scheme overrides `embed`: a model adds that to its embeddings, which attention does not see."""
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
        """The scheme's part in one attention call: queries stand at offset … offset + Lq - 1, keys at 0 … Lk - 1.

        Args:
            Lq: number of queries.
            Lk: number of keys.
            offset: position of the first query. None: Lk - Lq, so that the last query stands at the last key.
            device: of the result. None: where the scheme's parameters and constants are.
            dtype: of the queries. Rotation and table are fp32, or fp64 where it is.

        Returns:
            `Terms`, to pass as attention's position.

        Raises:
            TypeError: for a scheme that overrides no method.
        """
        self.check_acts()
        offset, dtype = Lk - Lq if offset is None else offset, torch.promote_types(dtype, torch.float32)
        device = next((x.device for x in chain(self.parameters(), self.buffers())), None) if device is None else device
        keys = torch.arange(Lk, device=device)
        queries = torch.arange(offset, offset + Lq, device=device)
        rotate_k = self.rotation(keys, dtype)
        rotate_q = rotate_k if (Lq, offset) == (Lk, 0) else self.rotation(queries, dtype)
        distance = torch.arange(-(Lq - 1) - offset, Lk - offset, device=device)
        table = self.bias(distance)
        return Terms(
            rotate_q, rotate_k, self.layout, None if table is None else table.to(dtype), self.vectors(distance),
            size=(Lq, Lk, offset), head_dim=self.head_dim, causal=self.causal,
        )  # fmt: skip

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of positions [L] for `fastlm.rotate`, each [L, R/2] in dtype; None where nothing turns."""
        angles = self.angles(positions.double())
        if angles is None:
            return None
        return (self.magnitude * angles.cos()).to(dtype), (self.magnitude * angles.sin()).to(dtype)

    def _apply(self, fn, recurse=True):
        """Follow the module to a device, but keep constants in their own dtype when a model is cast to 16 bits, and
        their numbers where it goes to the meta device or comes from there empty.
        """
        constants = {name: self._buffers[name] for name in self._non_persistent_buffers_set}
        super()._apply(fn, recurse)
        for name, constant in constants.items():
            device = self._buffers[name].device
            self._buffers[name] = constant if device.type == "meta" else constant.to(device)
        return self


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _optional(cls: type) -> set[str]:
    return {n for n, p in inspect.signature(cls).parameters.items() if p.default is not p.empty or p.kind in FREE}


def make(name: str, **facts) -> Position:
    """Build the scheme called `name` from the facts of a model.

    Args:
        name: a key of SCHEMES, such as "rope".
        facts: dim, heads, head_dim, context, causal (FACTS), of which the scheme takes those it wants, and any other
            arguments of its constructor.

    Returns:
        The scheme, for example make("alibi", heads=8, dim=512).

    Raises:
        ValueError: for a name that is not in SCHEMES.
        TypeError: for arguments that are neither in FACTS nor the scheme's, and for a wanted fact that is not given.
    """
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
    their numbers.
    """
    default = torch.empty(0).device
    return torch.device("cpu") if default.type == "meta" else default


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Rotary embedding in models of transformers, known by what it computes: their functions for it are many, and a name
promises little.

An attention calls one of its file's functions, which is asked to turn random rows by tables of random angles:

    layout      "half" pairs channel i with i + R/2 (GPT-NeoX, Llama), "interleaved" 2i with 2i + 1 (Cohere, GLM)
    repeats     how often, and in which order, a table of theirs holds each angle: "halves" is all of them twice over,
                "pairs" each one twice in a row, "once" neither

and the model's own modules that make such tables are asked whether theirs repeat that way. The attention keeps its
forward: the same code, which calls ours by another name.
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlm.interop.swap.served import Served
from fastlm.ops.rotary import LAYOUTS, rotate

PAIR, ALONE = ("q", "k", "cos", "sin", "unsqueeze_dim"), ("x", "cos", "sin", "unsqueeze_dim")  # what functions take
MAKES = ("x", "position_ids")  # and what modules that make tables take
REPEATS: dict[str, Callable[[Tensor], Tensor]] = {  # angles [..., n] → a table of theirs
    "halves": lambda angles: torch.cat((angles, angles), -1),
    "pairs": lambda angles: angles.repeat_interleave(2, -1),
    "once": lambda angles: angles,
}
ANGLES: dict[str, Callable[[Tensor], Tensor]] = {  # and back
    "halves": lambda table: table[..., : table.shape[-1] // 2],
    "pairs": lambda table: table[..., ::2],
    "once": lambda table: table,
}


class Kind(NamedTuple):
    """partial: whether channels past the table's pass through. casts: whether x's dtype comes out whatever the table's
    is.
    """

    layout: str
    repeats: str
    partial: bool
    casts: bool


class Rotating(Served):
    """An attention whose rotary function is ours."""

    how = "fastlm's rotary embedding, a pass each way"

    def forward(self, *args, **kwargs):
        return _rebound(type(self).original.forward)(self, *args, **kwargs)


def function_of(attention: type[nn.Module]) -> str | None:
    """The name under which a module's forward calls a rotary function, or None."""
    return _called(inspect.unwrap(attention.forward))


def refusal(attention: type[nn.Module], beside: Iterable[nn.Module]) -> str | None:
    """Why what modules of a class turn cannot be served, or None. beside: all modules of their model."""
    forward, name, file = attention.forward, function_of(attention), attention.__module__
    if hasattr(forward, "__wrapped__"):
        return "its forward is decorated, and calls its rotary function out of reach"
    kind = kind_of(forward.__globals__[name])
    if kind is None:
        return f"{name} turns no pairs of channels in a way that fastlm.rotate does"
    made = [table for one in beside if type(one).__module__ == file for table in _tables(one)]
    if not made:
        return f"nothing in {file} is known to make the tables of {name}"
    if not all(torch.equal(REPEATS[kind.repeats](ANGLES[kind.repeats](table)), table) for table in made):
        return f"{name} is given tables that do not repeat by {kind.repeats}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What a function computes


@functools.cache
def kind_of(function: Callable) -> Kind | None:
    """What a function of transformers turns, or None where `rotate` does nothing of the kind."""
    if tuple(inspect.signature(function).parameters) not in (PAIR, ALONE):
        return None
    for repeats in REPEATS:
        for layout in LAYOUTS:
            kind = Kind(layout, repeats, False, False)
            if _same(function, kind, 8):
                return kind._replace(partial=_same(function, kind, 12), casts=_casts(function, kind))
    return None


def _drawn(kind: Kind, D: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=random)
    rows = [draw(2, heads, 5, D).to(dtype) for heads in (3, 1)]
    return rows, *(REPEATS[kind.repeats](draw(2, 5, 4)) for _ in "cs")  # eight channels turn


def _same(function: Callable, kind: Kind, D: int) -> bool:
    rows, cos, sin = _drawn(kind, D, torch.float32)
    ours = _ours(function, kind._replace(partial=True))
    for dim in (1, 2):
        given = rows if dim == 1 else [x.transpose(1, 2) for x in rows]
        want, got = (_called_with(f, given, cos, sin, dim) for f in (function, ours))
        if want is None or any(
            x.shape != y.shape or not torch.allclose(x, y, atol=1e-5) for x, y in zip(want, got, strict=True)
        ):
            return False
    return True


def _casts(function: Callable, kind: Kind) -> bool:
    rows, cos, sin = _drawn(kind, 8, torch.bfloat16)
    return _called_with(function, rows, cos, sin, 1)[0].dtype == torch.bfloat16


def _called_with(function: Callable, rows: list[Tensor], cos: Tensor, sin: Tensor, dim: int) -> list[Tensor] | None:
    try:
        if tuple(inspect.signature(function).parameters) == PAIR:
            return list(function(*rows, cos, sin, unsqueeze_dim=dim))
        return [function(x, cos, sin, unsqueeze_dim=dim) for x in rows]
    except RuntimeError:  # shapes that it does not take
        return None


def _tables(module: nn.Module) -> list[Tensor]:
    """The tables that a module makes, cos and sin of every kind of layer; none if it is not known to make any."""
    if not type(module).__name__.endswith("RotaryEmbedding"):
        return []
    takes = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if takes not in (MAKES, (*MAKES, "layer_type")):
        return []
    kinds = [()] if takes == MAKES else [(kind,) for kind in sorted(set(module.config.layer_types))]
    asked, device = copy.deepcopy(module), next(module.buffers()).device  # some remember how long their rows were
    x, positions = torch.zeros(1, device=device), torch.arange(5, device=device)[None]
    with torch.no_grad():
        return [table for kind in kinds for table in asked(x, positions, *kind)]


# ---------------------------------------------------------------------------------------------------------------------
# What is called in its place


def _called(forward: Callable) -> str | None:
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    found = code and next((name for name in code.co_names if name.startswith("apply_rotary") and name in names), None)
    return found or None


@functools.cache
def _rebound(forward: Callable) -> Callable:
    """The same code under the same names but one."""
    name = _called(forward)
    function, other = forward.__globals__[name], f"{name}_by_fastlm"
    forward.__globals__[other] = _ours(function, kind_of(function))
    code = forward.__code__.replace(co_names=tuple(other if x == name else x for x in forward.__code__.co_names))
    made = types.FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _ours(function: Callable, kind: Kind) -> Callable:
    """A function with the arguments of theirs, which still answers for what rows and tables of other forms are."""

    def pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if not (_fits(kind, q, cos, unsqueeze_dim) and _fits(kind, k, cos, unsqueeze_dim)):
            return function(q, k, cos, sin, unsqueeze_dim)
        angles = _angles(kind, cos), _angles(kind, sin)
        return _turn(kind, q, angles, unsqueeze_dim), _turn(kind, k, angles, unsqueeze_dim)

    def alone(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        if not _fits(kind, x, cos, unsqueeze_dim):
            return function(x, cos, sin, unsqueeze_dim)
        return _turn(kind, x, (_angles(kind, cos), _angles(kind, sin)), unsqueeze_dim)

    return pair if tuple(inspect.signature(function).parameters) == PAIR else alone


def _fits(kind: Kind, x: Tensor, cos: Tensor, unsqueeze_dim: int) -> bool:
    if x.ndim != 4 or cos.ndim != 3 or unsqueeze_dim not in (1, 2) or cos.shape[0] not in (1, x.shape[0]):
        return False
    turned = cos.shape[-1] * (2 if kind.repeats == "once" else 1)
    wide = turned == x.shape[3] or (kind.partial and turned < x.shape[3])
    return wide and cos.shape[1] == x.shape[3 - unsqueeze_dim] and (kind.casts or cos.dtype == x.dtype)


def _angles(kind: Kind, table: Tensor) -> Tensor:
    angles = ANGLES[kind.repeats](table).to(torch.promote_types(table.dtype, torch.float32))
    return angles[0] if len(angles) == 1 else angles


def _turn(kind: Kind, x: Tensor, angles: tuple[Tensor, Tensor], unsqueeze_dim: int) -> Tensor:
    if unsqueeze_dim == 1:
        return rotate(x, *angles, kind.layout)
    return rotate(x.transpose(1, 2), *angles, kind.layout).transpose(1, 2)

"""The Adafactors in use: what each computes, what it calls its options and states, and which one is meant.

variant         factors                            lr                                       eps[0] (default)
"t5"            the two largest dimensions, both   None: ρ = min(0.01, 1/√t), times 0.05    added to g² (1e-30)
                ≥ min_dim_size_to_factor (128)     if scale_parameter is False; or a number
"huggingface"   the last two                       None: ρ = min(0.01, 1/√t); or a number   added to g² (1e-30)
"torch"         the last two                       a number (0.01): ρ = min(lr, 1/√t)       bounds √V (the dtype's)
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class Names(NamedTuple):
    """Two options and three states, by the names of the class that a variant stands in for."""

    clip: str = "clip_threshold"
    decay: str = "decay_rate"
    row: str = "exp_avg_sq_row"
    col: str = "exp_avg_sq_col"
    whole: str = "exp_avg_sq"


class Variant(NamedTuple):
    defaults: dict
    adds_eps: bool  # eps[0] is added to g², else it bounds the estimate from below
    decays: str  # "by step", "by lr", or "not"
    names: Names = Names()
    keeps_dims: bool = False  # a factor has the dimension that it is an average over, of size 1


VARIANTS = {
    "t5": Variant(dict(lr=None, eps=(1e-30, 1e-3), min_dim_size_to_factor=128), True, "not"),
    "huggingface": Variant(dict(lr=None, eps=(1e-30, 1e-3), min_dim_size_to_factor=0), True, "by step"),
    "torch": Variant(
        dict(lr=1e-2, eps=(None, 1e-3), min_dim_size_to_factor=0),
        False,
        "by lr",
        Names("d", "beta2_decay", "row_var", "col_var", "variance"),
        keeps_dims=True,
    ),
}
CLASSES = {"torch": "torch.optim.Adafactor", "huggingface": "transformers.Adafactor"}
TELLING = {  # arguments that one of these classes has, and the other has not
    "torch": ("d", "beta2_decay", "maximize", "foreach"),
    "huggingface": ("clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step", "warmup_init"),
}


def variant_of(arguments: dict) -> str:
    """The variant of the class that has these arguments; "huggingface", with a warning, if both have them all. Raises
    ValueError if they are of both. An argument that is None counts as left out.
    """
    telling = {variant: name for variant, names in TELLING.items() for name in names if arguments.get(name) is not None}
    if len(telling) == 2:
        theirs = " and ".join(f"{telling[variant]} is an argument of {CLASSES[variant]}" for variant in TELLING)
        raise ValueError(f'{theirs}; say which is meant, variant="torch" or variant="huggingface"')
    if telling:
        return next(iter(telling))
    warnings.warn(
        'Adafactor computes as transformers.Adafactor does, variant="huggingface": no argument says that '
        'torch.optim.Adafactor (variant="torch") or T5\'s own ("t5") is meant; give variant= to silence this',
        UserWarning,
        stacklevel=3,
    )
    return "huggingface"


def named(options: dict, variant: str) -> dict:
    """Options by the names that they have in a variant."""
    here = VARIANTS[variant].names if variant in VARIANTS else Names()
    words = {names[i]: here[i] for names in (Names(), VARIANTS["torch"].names) for i in range(2)}
    return {words.get(name, name): value for name, value in options.items()}


def variant_of_group(group: dict) -> str:
    """The variant whose class has such a group in its state dicts."""
    return group.get("variant") or ("torch" if "beta2_decay" in group else "huggingface")


def factored_dims(shape: torch.Size, group: dict) -> tuple[int, int] | None:
    """The two dimensions whose squares are kept as row and column means, in order; None for a tensor that is not
    factored.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    if group["variant"] != "t5":
        dims = (len(shape) - 2, len(shape) - 1)
    else:
        by_size = sorted(range(len(shape)), key=lambda dim: shape[dim])  # ties: the later dimension counts as larger
        dims = tuple(sorted(by_size[-2:]))
    return dims if min(shape[dim] for dim in dims) >= group["min_dim_size_to_factor"] else None


def moved_order(ndim: int, dims: tuple[int, int] | None) -> list[int]:
    """The dimensions of a tensor once the factored ones are moved last."""
    return [dim for dim in range(ndim) if dim not in (dims or ())] + list(dims or ())


def moved_last(tensors: list[Tensor], dims: list[tuple[int, int] | None]) -> list[Tensor]:
    """Tensors shaped like parameters with the factored dimensions moved last."""
    return [
        x if d is None or d == (x.ndim - 2, x.ndim - 1) else x.movedim(d, (-2, -1))
        for x, d in zip(tensors, dims, strict=True)
    ]


def factor_last(x: Tensor, keeps: int, lost: int, squeezes: bool) -> Tensor:
    """A row or column factor with the dimension that it keeps moved last, and without the lost one."""
    x, position = x.squeeze(lost) if squeezes else x, keeps - (lost < keeps)
    return x if position == x.ndim - 1 else x.movedim(position, -1)

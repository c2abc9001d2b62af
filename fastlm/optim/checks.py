"""What options and parameters may be: one check for each kind of value. Each raises ValueError, which says the value
and what to give instead."""

import math
from collections.abc import Callable, Collection
from numbers import Integral, Real

import torch
from torch import Tensor

from fastlm.optim import sharding

SERVED = (torch.float32, torch.bfloat16, torch.float16)


def finite(x: object) -> bool:
    return isinstance(x, Real) and math.isfinite(x)


def at_least_zero(**values: object) -> None:
    _each(values, lambda x: finite(x) and x >= 0, "give a finite number of at least 0")


def positive(**values: object) -> None:
    _each(values, lambda x: finite(x) and x > 0, "give a positive, finite number")


def bound(**values: object) -> None:
    _each(values, lambda x: isinstance(x, Real) and x > 0, "give a positive number; inf bounds nothing")


def below_one(**values: object) -> None:
    _each(values, lambda x: finite(x) and 0 <= x < 1, "give a number in [0, 1)")


def whole(least: int, **values: object) -> None:
    _each(values, lambda x: isinstance(x, Integral) and x >= least, f"give a whole number of at least {least}")


def flag(**values: object) -> None:
    _each(values, lambda x: isinstance(x, bool), "give True or False")


def one_of(choices: Collection, **values: object) -> None:
    _each(values, lambda x: x in tuple(choices), f"choose from {', '.join(map(repr, choices))}")


def pair(fits: Callable[[object, object], bool], cure: str, **values: object) -> None:
    """A tuple or list of two that fit."""
    for name, value in values.items():
        if not (isinstance(value, (tuple, list)) and len(value) == 2 and fits(*value)):
            raise ValueError(f"{name} are {value!r}; {cure}")


def betas(value: object) -> None:
    pair(lambda *both: all(finite(x) and 0 <= x < 1 for x in both), "give two, each in [0, 1)", betas=value)


def number(lr: object) -> float:
    """A learning rate's value. It may be a CPU tensor of one element, into which schedules write."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        raise ValueError(
            "lr is a tensor on the device, and reading it would stall the step; give a number or a CPU tensor"
        )
    if not (isinstance(lr, Real) or (isinstance(lr, Tensor) and lr.numel() == 1)):
        raise ValueError(f"lr is {lr!r}; give one number")
    return float(lr)


def process_group(value: object) -> None:
    # there is none in a torch that was built without torch.distributed
    kind = getattr(torch.distributed, "ProcessGroup", ())
    _each(
        dict(process_group=value),
        lambda x: x is None or isinstance(x, kind),
        "give a group of torch.distributed that this rank is in, or None",
    )


def parameter(p: Tensor, master: str | None) -> None:
    what = f"a parameter of shape {list(p.shape)}"
    if p.layout != torch.strided:
        raise ValueError(
            f"{what} is sparse ({p.layout}), and fastlm's optimizers take dense ones; give its .to_dense()"
        )
    sharding.check(p)
    if p.is_complex():
        raise ValueError(f"{what} is complex; fastlm's optimizers take real ones (torch.view_as_real gives a view)")
    if p.dtype == torch.float64:
        raise ValueError(f"{what} is fp64, and fastlm's optimizers compute in fp32; torch.optim's compute in fp64")
    if p.dtype not in SERVED:
        raise ValueError(
            f"{what} is {p.dtype}; fastlm's optimizers take fp32, bf16 and fp16: leave it out, or convert it"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{what} is expanded, so its elements share memory; give its .contiguous() copy, or the base")
    if p.dtype == torch.float16 and master in ("remainder", "stochastic"):
        raise ValueError(
            f"master={master!r} is for bf16 parameters and one of shape {list(p.shape)} is fp16; legal there: None, 'fp32'"
        )


def gradient(p: Tensor) -> None:
    if p.grad.layout != torch.strided:
        what = f"a parameter of shape {list(p.shape)} has a sparse gradient"
        raise ValueError(f"{what}; build its Embedding with sparse=False, or use torch.optim.SparseAdam")


def _each(values: dict[str, object], fits: Callable[[object], bool], cure: str) -> None:
    for name, value in values.items():
        if not fits(value):
            raise ValueError(f"{name} is {value!r}; {cure}")

"""What optimizers' options and parameters may be, besides plain values. Each raises ValueError, which says the value
and what to give instead.
"""

from numbers import Real

import torch
from torch import Tensor

from fastlm.checks import at_least_zero, below_one, bound, each, finite, flag, numbers, one_of, pair, positive, whole
from fastlm.optim import sharding

__all__ = [
    "at_least_zero", "below_one", "betas", "bound", "each", "finite", "flag", "gradient", "number", "numbers", "one_of",
    "pair", "parameter", "plain", "positive", "process_group", "whole",
]  # fmt: skip

SERVED = (torch.float32, torch.bfloat16, torch.float16)


def betas(value: object) -> None:
    def fit(*both: object) -> bool:
        return all(finite(plain(x)) and 0 <= x < 1 for x in both)

    pair(fit, "give two, each in [0, 1)", betas=value)


def plain(x: object) -> object:
    """The number that a CPU tensor of one element holds, into which schedules write; else x itself."""
    return x.item() if isinstance(x, Tensor) and x.device.type == "cpu" and x.numel() == 1 else x


def number(lr: object) -> float:
    """A learning rate's value."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        raise ValueError(
            "lr is a tensor on the device, and reading it would stall the step; give a number or a CPU tensor"
        )
    numbers(dict(lr=plain(lr)), lambda x: isinstance(x, Real) and not isinstance(x, bool), "give one number")
    return float(lr)


def process_group(value: object) -> None:
    # there is none in a torch that was built without torch.distributed
    kind = getattr(torch.distributed, "ProcessGroup", ())
    each(
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
            f"master={master!r} is for bf16 parameters and one of shape {list(p.shape)} is fp16; "
            "legal there: None, 'fp32'"
        )


def gradient(p: Tensor) -> None:
    if p.grad.layout != torch.strided:
        what = f"a parameter of shape {list(p.shape)} has a sparse gradient"
        raise ValueError(f"{what}; build its Embedding with sparse=False, or use torch.optim.SparseAdam")

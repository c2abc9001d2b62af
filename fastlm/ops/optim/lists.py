"""What every op over lists of tensors shares: how tensors are laid out for the C++ and CUDA launchers.

Elementwise rules do not care about shape, only that a parameter and its gradient and states keep their elements in one
order without gaps. Tensors that already do are passed as they are; others are copied to that layout and back.
"""

import torch
from torch import Tensor

from fastlm.backends.native import DTYPES

NUMBERS = DTYPES | {torch.int16: 3}  # and the remainders of bf16 parameters


def refuses_lists(**lists: list[Tensor]) -> str | None:
    """The first tensor no launcher can take, in words, or None."""
    for name, tensors in lists.items():
        device = tensors[0].device if tensors else None
        for i, t in enumerate(tensors):
            if t.layout != torch.strided:
                return f"{name}[{i}] has layout {t.layout}; only dense (strided) tensors are served"
            if t.dtype not in DTYPES:
                return f"{name}[{i}] is {t.dtype}; served are fp32, bf16 and fp16"
            if t.device != device:
                return f"{name}[{i}] is on {t.device} and {name}[0] on {device}; call once per device"
    return None


def dense(x: Tensor) -> Tensor:
    """x itself if its elements fill their memory without gaps or overlap, in any order of dimensions, else a contiguous
    copy.
    """
    return x if x.is_contiguous() or _dense(x) else x.contiguous()


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x itself if its elements lie as the strides say, else a copy that does."""
    return x if x.numel() <= 1 or x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def unrepeated(x: Tensor) -> Tensor:
    """x without the repetitions of an expanded tensor: what is done to it in place is done to each element once."""
    for dim, (stride, size) in enumerate(zip(x.stride(), x.shape, strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _dense(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def write_back(originals: list[Tensor], dense: list[Tensor]) -> None:
    """Copy results into the tensors that had to be laid out anew."""
    for original, laid_out in zip(originals, dense, strict=True):
        if original is not laid_out:
            original.copy_(laid_out)


def with_shapes(name: str, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The tensors. Raises ValueError where one has another shape: a launcher is given addresses, and would read past
    its end.
    """
    found = [x.shape for x in tensors]
    if found != shapes:
        i = next(i for i, (x, y) in enumerate(zip(found, shapes, strict=True)) if x != y)
        raise ValueError(f"{name}[{i}] has shape {list(found[i])}, and its parameter needs {list(shapes[i])}")
    return tensors


def fp32(name: str, tensors: list[Tensor], shapes: list[tuple[int, ...]], device: torch.device | None) -> list[Tensor]:
    """The tensors. Raises ValueError where one is not of its shape, fp32, and on the device."""
    for i, x in enumerate(with_shapes(name, tensors, shapes)):
        if x.dtype != torch.float32 or x.device != device:
            raise ValueError(f"{name}[{i}] is {x.dtype} on {x.device}; it must be torch.float32 on {device}")
    return tensors


def addresses(tensors: list[Tensor]) -> list[int]:
    """Of each tensor, as the launchers take what is fp32."""
    return [t.data_ptr() for t in tensors]


def cpp_list(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """(address, dtype number) of each tensor, as the launchers take what has a dtype of its own."""
    return [(t.data_ptr(), NUMBERS[t.dtype]) for t in tensors]

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
    return x if x.stride() == strides or x.numel() <= 1 else x.new_empty_strided(x.shape, strides).copy_(x)


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


class Lists:
    """A parameter list with its companions, gradients and states, laid out alike for a launcher. It must outlive the
    launch.

    Elements are in each parameter's own memory order where nothing depends on it; row_major=True, and noise, number
    them in row-major order. `write_back` copies results into those tensors that had to be laid out anew; gradients are
    only read. Raises ValueError where a tensor is not shaped as its parameter is, or a step is not an fp32 scalar on
    its device.
    """

    def __init__(
        self, params: list[Tensor], companions: list[Tensor], keys: list[int], grads: list[Tensor],
        steps: list[Tensor], *,
        row_major: bool = False, **states: list[Tensor],
    ):  # fmt: skip
        self.params = [p.contiguous() if row_major or keys else dense(p) for p in params]
        shapes, strides = [p.shape for p in params], [p.stride() for p in self.params]
        like = lambda name, xs: (
            [laid_out(x, of_p) for x, of_p in zip(with_shapes(name, xs, shapes), strides, strict=True)] if xs else []
        )
        self.companions, self.grads = like("companions", companions), like("grads", grads)
        self.states = [like(name, xs) for name, xs in states.items()]
        self.keys, self.steps = keys, addresses("steps", steps, [()] * len(params), params)
        self._written = list(
            zip((params, companions, *states.values()), (self.params, self.companions, *self.states), strict=True)
        )

    def sizes(self) -> list[int]:
        return [p.numel() for p in self.params]

    def arguments(self, module) -> tuple:
        """Parameters and the other lists as the launchers of `module` take them."""
        return (
            module.Parameters(cpp_list(self.params), cpp_list(self.companions), self.keys),
            cpp_list(self.grads),
            *map(cpp_list, self.states),
        )

    def write_back(self) -> None:
        for originals, dense in self._written:
            write_back(originals, dense)


def write_back(originals: list[Tensor], dense: list[Tensor]) -> None:
    """Copy results into the tensors that had to be laid out anew."""
    for original, laid_out in zip(originals, dense, strict=True):
        if original is not laid_out:
            original.copy_(laid_out)


def with_shapes(name: str, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The tensors. Raises ValueError where one has another shape: a launcher is given addresses, and would read past
    its end.
    """
    given = [x.shape for x in tensors]
    if given != shapes:
        i = next(i for i, (x, y) in enumerate(zip(given, shapes, strict=True)) if x != y)
        raise ValueError(f"{name}[{i}] has shape {list(given[i])}, and its parameter needs {list(shapes[i])}")
    return tensors


def addresses(name: str, tensors: list[Tensor], shapes: list[tuple[int, ...]], params: list[Tensor]) -> list[int]:
    """Addresses of tensors that must be dense, fp32, of these shapes, and where the parameters are."""
    device = params[0].device if params else None
    for i, x in enumerate(with_shapes(name, tensors, shapes)):
        if x.dtype != torch.float32 or x.device != device:
            raise ValueError(f"{name}[{i}] is {x.dtype} on {x.device}; it must be torch.float32 on {device}")
    return [x.data_ptr() for x in tensors]


def cpp_list(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """(address, dtype number) of each tensor, as the launchers take them."""
    return [(t.data_ptr(), NUMBERS[t.dtype]) for t in tensors]

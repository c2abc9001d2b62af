"""Logits that nobody has looked at: the states that a head was given, and what was done to its answer since."""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastlm.nn.loss import linear_cross_entropy


class Curve(NamedTuple):
    """What was done to each logit x: times · x, or times · tanh(inner · x)."""

    times: float = 1.0
    inner: float | None = None


PLAIN = Curve()


class Logits:
    """The answer of a linear head to states [..., dim], made when something is done to it that is not noted here.

    Noted is what losses do on their way to `cross_entropy`: float, view, contiguous, to a device or another floating
    dtype, leaving out positions, adding a bias, multiplying by numbers, a tanh that bounds. The cross entropy is then
    `fastlm.linear_cross_entropy`, in fp32. Whatever else is asked, of this object or of PyTorch, is asked of the
    logits themselves.
    """

    def __init__(self, head: nn.Linear, states: Tensor, bias: Tensor | None = None, curve: Curve = PLAIN):
        self.head, self.states, self.bias, self.curve = head, states, bias, curve
        self.made: Tensor | None = None

    def noted(self, **changed) -> "Logits":
        return Logits(**{"head": self.head, "states": self.states, "bias": self.bias, "curve": self.curve} | changed)

    def make(self) -> Tensor:
        """[..., V]: the head's own answer, with what was noted."""
        if self.made is None:
            x = F.linear(self.states, self.head.weight, self.head.bias)
            x = x if self.bias is None else x + self.bias
            x = x if self.curve.inner is None else torch.tanh(x * self.curve.inner)
            self.made = x if self.curve.times == 1 else x * self.curve.times
        return self.made

    # -----------------------------------------------------------------------------------------------------------------
    # What needs no logits

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.states.shape[:-1], self.head.out_features))

    @property
    def device(self) -> torch.device:
        return self.states.device

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> "Logits":
        return self

    def contiguous(self) -> "Logits":
        return self

    def to(self, *args, **kwargs):
        plain = not kwargs and len(args) == 1 and self.made is None
        if plain and (args[0] == self.device or (isinstance(args[0], torch.dtype) and args[0].is_floating_point)):
            return self
        return self.make().to(*args, **kwargs)

    def view(self, *shape):
        if self.made is None and shape == (-1, self.head.out_features):
            return self.noted(states=self.states.flatten(0, -2))
        return self.make().view(*shape)

    reshape = view

    def __getitem__(self, index):
        """Positions alone, as [..., :-1, :]."""
        whole = isinstance(index, tuple) and index[-1] == slice(None) and Ellipsis in index[:1]
        if self.made is None and whole and all(isinstance(i, slice) for i in index[1:]):
            return self.noted(states=self.states[index])
        return self.make()[index]

    def __add__(self, other):
        fresh = self.made is None and self.curve == PLAIN and self.bias is None
        if fresh and isinstance(other, Tensor) and other.numel() == other.shape[-1] == self.head.out_features:
            return self.noted(bias=other.flatten())
        return self.make() + other

    def __mul__(self, other):
        if self.made is None and _is_positive(other):
            return self.noted(curve=self.curve._replace(times=self.curve.times * other))
        return self.make() * other

    def __truediv__(self, other):
        return self * (1 / other) if self.made is None and _is_positive(other) else self.make() / other

    def tanh(self):
        if self.made is None and self.curve.inner is None:
            return self.noted(curve=Curve(inner=self.curve.times))
        return self.make().tanh()

    def cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
        label_smoothing=0.0,
    ) -> Tensor:  # fmt: skip
        """torch.nn.functional's."""
        rows = self.states.ndim == 2 and target.ndim == 1 and not target.is_floating_point()
        if self.made is not None or weight is not None or size_average is not None or reduce is not None or not rows:
            return F.cross_entropy(
                self.make(), target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
            )
        bias = self.head.bias if self.bias is None or self.head.bias is None else self.head.bias + self.bias
        times, inner = self.curve
        bound = (
            {"temperature": 1 / times} if inner is None else {"softcap": 1 / inner, "temperature": 1 / inner / times}
        )
        return linear_cross_entropy(
            self.states, self.head.weight, target, self.bias if bias is None else bias, ignore_index=ignore_index,
            label_smoothing=label_smoothing, reduction=reduction, **bound,
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------------
    # All else

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.cross_entropy and isinstance(args[0], cls):
            return args[0].cross_entropy(*args[1:], **kwargs)
        if function is torch.tanh and isinstance(args[0], cls) and not kwargs:
            return args[0].tanh()
        args, kwargs = tree_map(lambda x: x.make() if isinstance(x, cls) else x, (args, kwargs))
        return function(*args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.make(), name)


def _is_positive(x: object) -> bool:
    return isinstance(x, (int, float)) and x > 0


def _of_made(name: str):
    return lambda self, *args: getattr(operator, name)(self.make(), *args)


for _name in ("sub", "neg", "pow", "lt", "le", "gt", "ge", "eq", "ne", "matmul", "setitem"):
    setattr(Logits, f"__{_name}__", _of_made(f"__{_name}__"))
for _name in ("radd", "rmul", "rsub", "rtruediv", "len", "iter"):
    setattr(Logits, f"__{_name}__", lambda self, *args, name=f"__{_name}__": getattr(self.make(), name)(*args))

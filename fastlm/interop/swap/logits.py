"""Logits that nobody has looked at: the states that a head was given, and what was done to its answer since."""

from collections.abc import Callable
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

    Args:
        head: the layer.
        states: [..., dim], what of them is still there.
        bias, curve: what was added and done to each logit.
        make: what makes the logits, once; the head's own answer, and then what was asked, in its order.
    """

    def __init__(self, head: nn.Linear, states: Tensor, bias: Tensor | None, curve: Curve, make: Callable[[], Tensor]):
        self.head, self.states, self.bias, self.curve = head, states, bias, curve
        self.made: Tensor | None = None
        self._make = make

    @classmethod
    def of(cls, head: nn.Linear, states: Tensor) -> "Logits":
        return cls(head, states, None, PLAIN, lambda: F.linear(states, head.weight, head.bias))

    def make(self) -> Tensor:
        """[..., V]"""
        if self.made is None:
            self.made = self._make()
        return self.made

    def noted(self, asked: Callable[[Tensor], Tensor], **changed) -> "Logits":
        """What `asked` makes of the logits, where it does no more than to change these attributes."""
        now = {"states": self.states, "bias": self.bias, "curve": self.curve} | changed
        return Logits(self.head, **now, make=lambda: asked(self.make()))

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

    def float(self):
        return self.to(torch.float32)

    def contiguous(self):
        return self.noted(Tensor.contiguous) if self.made is None else self.made.contiguous()

    def to(self, *args, **kwargs):
        asked = lambda x: x.to(*args, **kwargs)
        plain = not kwargs and len(args) == 1 and self.made is None
        if plain and (args[0] == self.device or (isinstance(args[0], torch.dtype) and args[0].is_floating_point)):
            return self.noted(asked)
        return asked(self.make())

    def reshape(self, *shape):
        asked = lambda x: x.reshape(*shape)
        if self.made is None and shape == (-1, self.head.out_features):
            return self.noted(asked, states=self.states.flatten(0, -2))
        return asked(self.make())

    view = reshape

    def __getitem__(self, index):
        """Positions alone, as [..., :-1, :]."""
        whole = isinstance(index, tuple) and index[-1] == slice(None) and Ellipsis in index[:1]
        if self.made is None and whole and all(isinstance(i, slice) for i in index[1:]):
            return self.noted(lambda x: x[index], states=self.states[index])
        return self.make()[index]

    def __add__(self, other):
        fresh = self.made is None and self.curve == PLAIN and self.bias is None
        if fresh and isinstance(other, Tensor) and other.numel() == other.shape[-1] == self.head.out_features:
            return self.noted(lambda x: x + other, bias=other.flatten())
        return self.make() + other

    def __mul__(self, other):
        if self.made is None and _is_positive(other):
            return self.noted(lambda x: x * other, curve=self.curve._replace(times=self.curve.times * other))
        return self.make() * other

    def __truediv__(self, other):
        if self.made is None and _is_positive(other):
            return self.noted(lambda x: x / other, curve=self.curve._replace(times=self.curve.times / other))
        return self.make() / other

    def tanh(self):
        if self.made is None and self.curve.inner is None:
            return self.noted(torch.tanh, curve=Curve(inner=self.curve.times))
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


OF_MADE = (  # operators, which Python looks for in the class
    "sub", "neg", "pow", "lt", "le", "gt", "ge", "eq", "ne", "matmul", "radd", "rmul", "rsub", "rtruediv", "len",
    "iter", "setitem",
)  # fmt: skip
for _name in OF_MADE:
    setattr(Logits, f"__{_name}__", lambda self, *args, name=f"__{_name}__": getattr(self.make(), name)(*args))

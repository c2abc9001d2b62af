"""Who looks on at a call, and calls at which nobody does: these go without torch.library's operator, which takes longer
than a small op's kernel (benchmarks/FACTS.md), and compute at once, beneath an autograd.Function.

Those who look on are compilers, tracers, modes of `torch.utils._python_dispatch` and `torch.overrides`, and subclasses
of tensors, fake and functional ones among them. And the dispatcher alone reads tensors whose memory is not what they
hold, such as one that waits to be negated.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from operator import or_

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastlm.backends.signature import Signature

PLAIN = frozenset({Tensor, Parameter, type(None), bool, int, float, str, list})
KEYS = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
# a tensor with any other key is for the dispatcher to read
OTHER_KEYS = ~reduce(or_, (DispatchKeySet(getattr(DispatchKey, key)).raw_repr() for key in KEYS))


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is on: custom operators know neither, and would be wrong."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def observed(values: tuple) -> bool:
    """Whether anybody looks on at a call with these values. Lists among them hold no tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not PLAIN.issuperset(map(type, values))
        or any(torch._C._dispatch_keys(x).raw_repr() & OTHER_KEYS for x in values if isinstance(x, Tensor))
    )


class Eager:
    """An op's calls without its operator.

    compute(backend, args): what the backend makes of the op's arguments. gradient: (save, backward), as
    torch.library.register_autograd takes them.
    """

    def __init__(self, name: str, signature: Signature, compute: Callable):
        self._name, self._signature, self._compute = f"fastlm::{name}", signature, compute
        self._functions: dict[str, Callable] = {}  # by the backend's name
        self.gradient: tuple[Callable, Callable] = (lambda ctx, inputs, output: None, self._has_no_gradient)

    def _has_no_gradient(self, ctx, *grads):
        raise RuntimeError(f"{self._name} has no gradient")

    def __call__(self, backend, args: tuple, values: tuple):
        """What the backend makes of args. values: they one by one."""
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*values):
            if backend.name not in self._functions:
                self._functions[backend.name] = self._function(backend)
            output = self._functions[backend.name](*values)
            return list(output) if self._signature.returns_list else output
        profiled = torch.autograd._profiler_enabled()
        with torch.autograd.profiler.record_function(self._name) if profiled else nullcontext():
            return self._compute(backend, args)

    def _function(self, backend) -> Callable:
        """Values → the backend's results, with a gradient."""
        (save, backward), is_list = self.gradient, self._signature.returns_list

        def forward(ctx, *values):
            output = self._compute(backend, self._signature.unflatten(values))
            save(ctx, values, output)
            return tuple(output) if is_list else output

        def gradient(ctx, *grads):
            return backward(ctx, list(grads)) if is_list else backward(ctx, *grads)

        members = dict(forward=staticmethod(forward), backward=staticmethod(gradient))
        return type(self._name, (torch.autograd.Function,), members).apply

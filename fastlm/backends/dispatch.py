"""Who computes: every operation of fastlm is one `Op`, and this file is the only place that chooses a backend.

An Op starts as its definition: a plain PyTorch function that is at once the documentation, the reference in tests, the
shape function under fake tensors, and the last resort on any device. Faster backends are registered beneath it, fastest
first, and an Op becomes a `torch.library` custom operator, so `torch.compile`, `opcheck` and autograd know it:

    @op
    def scale(x: Tensor, by: float) -> Tensor:
        return x * by

    @scale.backend("cpp", devices=("cpu",), missing=native.missing, refuses=lambda x, by: ...)
    def _(x, by): ...

    @scale.gradient(save=...)
    def _(ctx, grad): ...

A call takes the first backend that serves the tensors' device, is present, and does not refuse the arguments. When one
is missing or refuses, the reason is told once as a `SlowPathWarning`. `use_backend` forces a choice: what cannot be
done that way raises `BackendError` with the reason. Nothing falls back in silence."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

REFERENCE = "reference"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message says why and what would."""


class SlowPathWarning(UserWarning):
    """A fast backend is missing or refused the arguments, and a slower one computed the result."""


def _present(device: torch.device) -> str | None:
    return None


def _refuses_nothing(*args) -> str | None:
    return None


def _yields_nothing(*args) -> bool:
    return False


@dataclass(frozen=True)
class Backend:
    """One way to compute an Op.

    devices: device types on which it is chosen unasked. missing(device): why it cannot run there at all, or None.
    refuses(*args): why it cannot compute these arguments, or None. yields(*args): whether it could, but a backend
    ranked after it is faster. differentiable: it is made of PyTorch operators that carry their own gradient, and is
    called outside the custom operator so that autograd and torch.compile see it whole."""

    name: str
    run: Callable
    devices: tuple[str, ...]
    missing: Callable[[torch.device], str | None] = _present
    refuses: Callable[..., str | None] = _refuses_nothing
    yields: Callable[..., bool] = _yields_nothing
    differentiable: bool = False


OPS: dict[str, "Op"] = {}
_forced: list[dict[str, str]] = []  # op name, or "" for every op → backend name; the last that speaks of an op decides


@contextmanager
def use_backend(name: str | None = None, **ops: str) -> Iterator[None]:
    """Force a backend inside the `with` block: `use_backend("reference")` for every op,
    `use_backend(attention="triton")` for one and its gradient. The innermost choice wins; in one call, an op's own
    choice goes before its forward's, and that before the choice for every op. It holds for the whole process, since
    backward passes run on threads of their own.

    Raises BackendError at once if no op has the backend; a call that the forced backend cannot serve raises it there.
    The environment variable FASTLM_BACKEND sets the outermost choice for every op.
    """
    wanted = ({"": name} if name is not None else {}) | ops
    for op_name, backend_name in wanted.items():
        _check_known(op_name, backend_name)
    _forced.append(wanted)
    try:
        yield
    finally:
        # not always the last: another thread may be inside
        _forced[:] = [choice for choice in _forced if choice is not wanted]


def _check_known(op_name: str, backend_name: str) -> None:
    if op_name and op_name not in OPS:
        raise BackendError(f"no op is named {op_name!r}; the ops are {', '.join(sorted(OPS))}")
    known = OPS[op_name].names() if op_name else sorted({n for o in OPS.values() for n in o.names()})
    if backend_name not in known:
        raise BackendError(
            f"{op_name or 'no op'} has {'no ' if op_name else 'a '}backend {backend_name!r}; choose from {', '.join(known)}"
        )


def forced_backend(op_name: str) -> str | None:
    """The backend name that `use_backend` or FASTLM_BACKEND asks for, or None for a free choice."""
    forward = op_name.removesuffix("_backward")
    for choice in reversed(_forced):
        if op_name in choice:
            return choice[op_name]
        if forward in choice and choice[forward] in OPS[op_name].names():  # a choice for an op is one for its gradient
            return choice[forward]
        if "" in choice:
            return choice[""]
    return os.environ.get("FASTLM_BACKEND") or None


class Op:
    """An operation with one definition, ranked backends, and one gradient. Made by the decorator `op`."""

    def __init__(self, definition: Callable, mutates: tuple[str, ...] = ()):
        self.name = definition.__name__
        self.definition = definition
        self.backends: list[Backend] = []
        self.signature = inspect.signature(definition)
        self.__doc__ = definition.__doc__
        self._told: set[tuple[str, str]] = set()
        schema = torch.library.infer_schema(definition, mutates_args=mutates)
        self.torch_op = torch.library.custom_op(f"fastlm::{self.name}", self._run, mutates_args=mutates, schema=schema)
        self.torch_op.register_fake(definition)
        OPS[self.name] = self

    def backend(self, name: str, *, devices: tuple[str, ...], **traits) -> Callable:
        """Register the decorated function, which takes the definition's arguments, as the next-ranked backend."""

        def register(run: Callable) -> Callable:
            self.backends.append(Backend(name, run, devices, **traits))
            return run

        return register

    def gradient(self, save: Callable) -> Callable:
        """Register the decorated `backward(ctx, *grads)`; `save(ctx, inputs, output)` keeps what it needs."""

        def register(backward: Callable) -> Callable:
            self.torch_op.register_autograd(backward, setup_context=save)
            return backward

        return register

    def names(self) -> list[str]:
        """Backend names, fastest first; the definition is always the last."""
        return [b.name for b in self.backends] + [REFERENCE]

    def __call__(self, *args):
        for rank, backend in enumerate(self.backends):  # no further than it must: torch.compile traces this choice
            if (
                backend.differentiable
                and forced_backend(self.name) in (None, backend.name)
                and self.choose(*args, best=rank + 1) is backend
            ):
                return backend.run(*args)
        if not transformed():
            return self.torch_op(*args)
        if forced_backend(self.name) == REFERENCE:
            return self._run(*args)  # plain PyTorch, which transforms see through
        raise BackendError(
            f"vmap, torch.func and forward-mode derivatives do not see through fastlm.{self.name}: put a mapped dimension into the batch, "
            'differentiate with autograd, or call it under fastlm.use_backend("reference"), whose plain PyTorch they do see through'
        )

    def _run(self, *args):
        run = self.choose(*args).run
        device = device_of(args)
        if torch.is_autocast_enabled(device.type):  # the arguments' dtypes were settled by the caller
            with torch.autocast(device.type, enabled=False):
                return run(*args)
        return run(*args)

    def choose(self, *args, best: int | None = None) -> Backend:
        """The backend that will compute this call, out of the `best` ranked first. Raises BackendError if a forced one
        cannot."""
        device = device_of(args)
        forced = forced_backend(self.name)
        if forced is not None:
            return self._forced_choice(forced, device, args)
        for backend in self.backends[:best]:
            if device.type not in backend.devices:
                continue
            reason = backend.missing(device)
            if reason is not None:
                self._tell(backend, "is missing", reason)
                continue
            reason = backend.refuses(*args)
            if reason is not None:
                self._tell(backend, "refused", reason)
            elif not backend.yields(*args):
                return backend
        return self._reference

    @property
    def _reference(self) -> Backend:
        return Backend(REFERENCE, self.definition, devices=())

    def _forced_choice(self, name: str, device: torch.device, args: tuple) -> Backend:
        if name == REFERENCE:
            return self._reference
        candidates = [b for b in self.backends if b.name == name]
        if not candidates:
            raise BackendError(f"{self.name} has no backend {name!r}; it has {', '.join(self.names())}")
        reason = candidates[0].missing(device) or candidates[0].refuses(*args)
        if reason:
            raise BackendError(f"{self.name}: backend {name!r} cannot serve this call: {reason}")
        return candidates[0]

    def _tell(self, backend: Backend, what: str, reason: str) -> None:
        """Warn, once for each backend and reason, that a slower one computes."""
        # a hand-over to PyTorch is a convenience, not a promise
        if backend.differentiable or (backend.name, reason) in self._told:
            return
        self._told.add((backend.name, reason))
        warnings.warn(f"fastlm.{self.name}: backend {backend.name!r} {what}: {reason}", SlowPathWarning, stacklevel=2)

    def explain(self, device: torch.device) -> list[tuple[str, str | None]]:
        """(backend name, why it is unavailable on `device` or None), fastest first. What `fastlm info` prints."""
        rows = []
        for b in self.backends:
            reason = b.missing(device)
            if reason is None and device.type not in b.devices:
                reason = f"not chosen unasked on {device.type}"
            rows.append((b.name, reason))
        return [*rows, (REFERENCE, None)]


def op(definition: Callable | None = None, *, mutates: tuple[str, ...] = ()):
    """Turn a plain PyTorch function with annotated arguments into an Op. `mutates` names arguments written in place."""
    if definition is None:
        return lambda d: Op(d, mutates)
    return Op(definition, mutates)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work. Custom operators know neither: vmap would loop
    over them, and their tangents would be zero without an error."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def device_of(args: tuple) -> torch.device:
    """The device of the first tensor among the arguments, looking into lists."""
    for a in args:
        if isinstance(a, Tensor):
            return a.device
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device
    return torch.device("cpu")

"""Who computes: every operation of fastlm is one `Op`, and this file is the only place that chooses a backend.

An Op starts as its definition, a plain PyTorch function: documentation, reference in tests, shape function under fake
tensors, and last resort on any device. Faster backends are registered beneath it, fastest first. It becomes a
`torch.library` custom operator, so that `torch.compile` and `opcheck` know it, and computes without where nobody looks
on (eager.py):

    @op
    def scale(x: Tensor, by: float) -> Tensor:
        return x * by

    @scale.backend("cpp", devices=("cpu",), unavailable=native.unavailable, refuses=lambda x, by: ...)
    def _(x, by): ...

    @scale.gradient(save=...)
    def _(ctx, grad): ...

A parameter annotated with a NamedTuple is that tuple to Python, and its fields to the operator. A call takes the first
backend that serves the device, is available, and does not refuse the arguments; a `SlowPathWarning` says once why one
is unavailable or refuses. `use_backend` forces a choice, or raises `BackendError`. Nothing falls back in silence.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.backends.eager import Eager, observed, transformed
from fastlm.backends.signature import Signature

REFERENCE = "reference"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message says why and what would."""


class SlowPathWarning(UserWarning):
    """A fast backend is unavailable or refused the arguments, and a slower one computed the result."""


def _available(device: torch.device) -> str | None:
    return None


def _refuses_nothing(*args) -> str | None:
    return None


def _never_slower(*args) -> bool:
    return False


@dataclass(frozen=True)
class Backend:
    """One way to compute an Op, inside the custom operator, or outside where autograd then sees it whole."""

    name: str
    run: Callable
    devices: tuple[str, ...]  # device types on which it is chosen unasked
    unavailable: Callable[[torch.device], str | None] = _available  # why it cannot run there at all, or None
    refuses: Callable[..., str | None] = _refuses_nothing  # why it cannot compute these arguments, or None
    slower_than_next: Callable[..., bool] = _never_slower  # whether it could, but a later-ranked one is faster
    differentiable: bool = False  # of PyTorch operators with their own gradient: called outside


OPS: dict[str, "Op"] = {}
_forced: list[dict[str, str]] = []  # op name, or "" for every op → backend name; the last that speaks of an op decides
_records: list[dict[str, str]] = []  # op name → backend name, of those who ask


@contextmanager
def use_backend(name: str | None = None, **ops: str) -> Iterator[None]:
    """Force a backend inside a `with` block: `use_backend("reference")`, or `use_backend(attention="triton")`.

    Args:
        name: a backend for every op. None: no such choice.
        ops: op name = backend name, for one op and its gradient.

    Raises:
        BackendError: at once if no op has the backend; at a call, if the forced backend cannot serve it.

    The innermost block wins; in it, an op's own choice goes before its forward's, and that before the one for every op.
    It holds in all threads, for backward passes have their own. FASTLM_BACKEND in the environment is the outermost.
    """
    choice = ({"": name} if name is not None else {}) | ops
    for op_name, backend_name in choice.items():
        _check_known(op_name, backend_name)
    _forced.append(choice)
    try:
        yield
    finally:
        # not always the last: another thread may be inside
        _forced[:] = [other for other in _forced if other is not choice]


@contextmanager
def record_choices() -> Iterator[dict[str, str]]:
    """`with record_choices() as chosen:` op name → the backend of its last call in the block, on any thread."""
    chosen: dict[str, str] = {}
    _records.append(chosen)
    try:
        yield chosen
    finally:
        _records[:] = [record for record in _records if record is not chosen]


def _check_known(op_name: str, backend_name: str) -> None:
    if op_name and op_name not in OPS:
        raise BackendError(f"no op is named {op_name!r}; the ops are {', '.join(sorted(OPS))}")
    known = OPS[op_name].names() if op_name else sorted({n for o in OPS.values() for n in o.names()})
    if backend_name not in known:
        raise BackendError(
            f"{op_name or 'no op'} has {'no ' if op_name else 'a '}backend {backend_name!r}; "
            f"choose from {', '.join(known)}"
        )


def forced_backend(op_name: str) -> str | None:
    """The backend name that `use_backend` or FASTLM_BACKEND asks for, or None for a free choice."""
    op = OPS[op_name]
    forward = op_name if op.gradient_of is None else op.gradient_of.name
    for choice in reversed(_forced):
        if op_name in choice:
            return choice[op_name]
        if forward in choice and choice[forward] in op.names():  # a choice for an op is one for its gradient
            return choice[forward]
        if "" in choice:
            return choice[""]
    return os.environ.get("FASTLM_BACKEND") or None


class Op:
    """An operation with one definition, ranked backends, and one gradient. Made by the decorator `op`."""

    def __init__(self, definition: Callable, mutates: tuple[str, ...] = (), gradient_of: "Op | None" = None):
        self.name = definition.__name__
        self.definition = definition
        self.gradient_of = gradient_of
        self.signature = Signature(definition)
        self.backends: list[Backend] = []
        self._outside: list[Backend] = []  # the differentiable ones, which the operator never sees; the first in rank
        self._inside: list[Backend] = []
        self._reference = Backend(REFERENCE, definition, devices=())
        self.__doc__ = definition.__doc__
        self._told: set[tuple[str, str]] = set()
        # it tells the versions of what it writes, and autograd.Function knows no lists
        self._by_operator = bool(mutates) or self.signature.takes_lists
        self._eager = Eager(self.name, self.signature, self._compute)
        schema = torch.library.infer_schema(self.signature.flat, mutates_args=mutates)
        self.torch_op = torch.library.custom_op(f"fastlm::{self.name}", self._run, mutates_args=mutates, schema=schema)
        self.torch_op.register_fake(lambda *values: definition(*self.signature.unflatten(values)))
        OPS[self.name] = self

    def backend(self, name: str, *, devices: tuple[str, ...], **traits) -> Callable:
        """Register the decorated function, which takes the definition's arguments, as the next-ranked backend.

        Args:
            name: what `use_backend` calls it.
            devices: device types on which it is chosen unasked.
            traits: the other fields of `Backend`. Differentiable backends are registered before the others.
        """

        def register(run: Callable) -> Callable:
            backend = Backend(name, run, devices, **traits)
            assert not (backend.differentiable and self._inside), f"{name} is differentiable: register it first"
            self.backends.append(backend)
            (self._outside if backend.differentiable else self._inside).append(backend)
            return run

        return register

    def gradient(self, save: Callable) -> Callable:
        """Register the decorated `backward(ctx, *grads)`; `save(ctx, inputs, output)` keeps what it needs.

        inputs are the definition's arguments. It returns a gradient or None for each, a NamedTuple for a NamedTuple.
        """

        def setup(ctx, inputs, output):
            save(ctx, self.signature.unflatten(inputs), output)

        def register(backward: Callable) -> Callable:
            flat = lambda ctx, *grads: self.signature.flatten(backward(ctx, *grads))
            self._eager.gradient = setup, flat
            self.torch_op.register_autograd(flat, setup_context=setup)
            return backward

        return register

    def names(self) -> list[str]:
        """Backend names, fastest first; the definition is always the last."""
        return [b.name for b in self.backends] + [REFERENCE]

    def __call__(self, *args):
        values = self.signature.flatten(args)
        by_operator = self._by_operator or observed(values)
        backend = self._first(self._outside if by_operator else self.backends, args)
        if backend is not None and backend.differentiable:
            self._record(backend)
            return backend.run(*args)
        if not transformed():
            return self.torch_op(*values) if by_operator else self._eager(backend or self._reference, args, values)
        if forced_backend(self.name) == REFERENCE:
            return self._compute(self._reference, args)  # plain PyTorch, which transforms see through
        raise BackendError(
            f"vmap, torch.func and forward-mode derivatives do not see through fastlm.{self.name}: put a mapped "
            "dimension into the batch, differentiate with autograd, or call it under "
            'fastlm.use_backend("reference"), whose plain PyTorch they do see through'
        )

    def _run(self, *values):
        """The operator: the call's arguments one by one."""
        args = self.signature.unflatten(values)
        return self._compute(self._first(self._inside, args) or self._reference, args)

    def _compute(self, backend: Backend, args: tuple):
        self._record(backend)
        device = device_of(args)
        if torch.is_autocast_enabled(device.type):  # the arguments' dtypes were settled by the caller
            with torch.autocast(device.type, enabled=False):
                return backend.run(*args)
        return backend.run(*args)

    def choose(self, *args) -> Backend:
        """The backend that will compute this call. Raises BackendError if a forced one cannot."""
        return self._first(self.backends, args) or self._reference

    def _first(self, backends: list[Backend], args: tuple) -> Backend | None:
        """The first of these that serves the call, or the forced one if it is there. BackendError if that cannot."""
        device = device_of(args)
        forced = forced_backend(self.name)
        if forced is not None:
            return self._forced_choice(forced, backends, device, args)
        for backend in backends:
            if device.type not in backend.devices:
                continue
            reason = backend.unavailable(device)
            if reason is not None:
                self._tell(backend, "is unavailable", reason)
                continue
            reason = backend.refuses(*args)
            if reason is not None:
                self._tell(backend, "refused", reason)
            elif not backend.slower_than_next(*args):
                return backend
        return None

    def _forced_choice(self, name: str, backends: list[Backend], device: torch.device, args: tuple) -> Backend | None:
        if name not in self.names():
            raise BackendError(f"{self.name} has no backend {name!r}; it has {', '.join(self.names())}")
        for backend in backends:
            if backend.name == name:
                reason = backend.unavailable(device) or backend.refuses(*args)
                if reason:
                    raise BackendError(f"{self.name}: backend {name!r} cannot serve this call: {reason}")
                return backend
        return None

    def _record(self, backend: Backend) -> None:
        for chosen in _records:
            chosen[self.name] = backend.name

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
            reason = b.unavailable(device)
            if reason is None and device.type not in b.devices:
                reason = f"not chosen unasked on {device.type}"
            rows.append((b.name, reason))
        return [*rows, (REFERENCE, None)]


def op(definition: Callable | None = None, *, mutates: tuple[str, ...] = (), gradient_of: Op | None = None):
    """Make an annotated PyTorch function an Op. mutates: what it writes in place. gradient_of: whose gradient it is."""
    if definition is None:
        return lambda d: Op(d, mutates, gradient_of)
    return Op(definition)


def device_of(args: tuple) -> torch.device:
    """The device of the first tensor among the arguments, looking into lists."""
    for a in args:
        if isinstance(a, Tensor):
            return a.device
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device
    return torch.device("cpu")

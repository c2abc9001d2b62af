"""Triton's interpreter made quicker, with the same results: it runs every operation of a kernel in Python, and most of
its time goes into finding out again what it knew.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import index

from triton.language import core
from triton.runtime import interpreter


def patch_once() -> None:
    """Let a kernel's own functions find triton.language as the kernel's launch has patched it, where the interpreter
    looks through the whole module at each call of each function; and make what is known of a type once.
    """
    interpreter._patch_lang = _patched_by_the_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once(interpreter._get_np_dtype, lambda dtype: dtype.scalar.name)
    core.block_type.__init__ = _attributes_once(
        core.block_type.__init__, lambda element, shape: (element.name, *map(index, shape))
    )
    core.tensor.__init__ = _tensor


def _patched_by_the_launch(patch: Callable) -> Callable:
    @cache
    def languages(fn) -> list:
        return [value for value in fn.__globals__.values() if value in (core, interpreter.tl)]

    def patched(fn):
        done = languages(fn) and not any(core.is_builtin(language.load) for language in languages(fn))
        return interpreter._LangPatchScope() if done else patch(fn)

    return patched


def _once(make: Callable, key: Callable) -> Callable:
    """What `make` returns, made once for each key of its arguments."""
    made = {}

    def kept(*args):
        known = key(*args)
        if known not in made:
            made[known] = make(*args)
        return made[known]

    return kept


def _attributes_once(init: Callable, key: Callable) -> Callable:
    """An __init__ that leaves the attributes it left before."""

    def attributes(*args) -> dict:
        first = type("", (), {})()
        init(first, *args)
        return vars(first)

    attributes = _once(attributes, key)
    return lambda self, *args: vars(self).update(attributes(*args))


@cache
def _shape(sizes: tuple[int, ...]) -> core.tuple:
    return core.tuple([core.constexpr(size) for size in sizes])


def _tensor(self, handle, type) -> None:
    """tl.tensor.__init__, whose shapes are kept."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    sizes = type.shape if type.is_block() else ()
    self.numel, self.shape = core.constexpr(type.numel if sizes else 1), _shape(sizes)


@contextmanager
def overflow_unchecked() -> Iterator[None]:
    """Integers are not computed a second time in 64 bits, to see whether they overflowed."""
    builder = interpreter.interpreter_builder
    checked = builder.options
    builder.options = dataclasses.replace(checked, sanitize_overflow=False)
    yield
    builder.options = checked

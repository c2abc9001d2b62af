"""Triton's interpreter made quicker, with the same results: it runs every operation of a kernel in Python."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Let a kernel's own functions find triton.language as the kernel's launch has patched it. The interpreter looks
    through the whole module at each call of each function, which takes half of its time.
    """
    interpreter._patch_lang = _once(interpreter._patch_lang)


def _once(patch: Callable) -> Callable:
    def patched(fn):
        langs = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        done = bool(langs) and not any(tl.core.is_builtin(lang.load) for lang in langs)
        return interpreter._LangPatchScope() if done else patch(fn)

    return patched


@contextmanager
def overflow_unchecked() -> Iterator[None]:
    """Integers are not computed a second time in 64 bits, to see whether they overflowed."""
    builder = interpreter.interpreter_builder
    checked = builder.options
    builder.options = dataclasses.replace(checked, sanitize_overflow=False)
    yield
    builder.options = checked

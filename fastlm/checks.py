"""What arguments may be: one check for each kind of value, for every room. Each raises ValueError, which says the value
and what to give instead. Needs nothing but Python.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterable
from numbers import Integral, Real


def number(x: object) -> bool:
    """Whether x is a real number; True and False are none."""
    return isinstance(x, Real) and not isinstance(x, bool)


def finite(x: object) -> bool:
    return number(x) and math.isfinite(x)


def at_least_zero(**values: object) -> None:
    numbers(values, lambda x: finite(x) and x >= 0, "give a finite number of at least 0")


def positive(**values: object) -> None:
    numbers(values, lambda x: finite(x) and x > 0, "give a positive, finite number")


def bound(**values: object) -> None:
    numbers(values, lambda x: number(x) and x > 0, "give a positive number; inf bounds nothing")


def below_one(**values: object) -> None:
    numbers(values, lambda x: finite(x) and 0 <= x < 1, "give a number in [0, 1)")


def share(**values: object) -> None:
    numbers(values, lambda x: finite(x) and 0 <= x <= 1, "give a share, from 0 to 1")


def whole(least: int, cure: str | None = None, **values: object) -> None:
    def fits(x: object) -> bool:
        return isinstance(x, Integral) and not isinstance(x, bool) and x >= least

    numbers(values, fits, f"give a whole number of at least {least}" if cure is None else cure)


def flag(**values: object) -> None:
    each(values, lambda x: isinstance(x, bool), "give True or False")


def one_of(choices: Collection, **values: object) -> None:
    each(values, lambda x: x in tuple(choices), f"choose from {', '.join(map(repr, choices))}")


def pair(fits: Callable[[object, object], bool], cure: str, **values: object) -> None:
    """A tuple or list of two that fit."""
    for name, value in values.items():
        if not (isinstance(value, (tuple, list)) and len(value) == 2 and fits(*value)):
            raise ValueError(f"{name} are {value!r}; {cure}")


def numbers(values: dict[str, object], fits: Callable[[object], bool], cure: str) -> None:
    """`each`, for numbers, which a string is not, whatever it holds."""
    strings = any(isinstance(value, str) for value in values.values())
    each(values, fits, f"{cure} (YAML reads 1e-3 as a string, and 1.0e-3 as a number)" if strings else cure)


def each(values: dict[str, object], fits: Callable[[object], bool], cure: str) -> None:
    for name, value in values.items():
        if not fits(value):
            raise ValueError(f"{name} is {value!r}; {cure}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing if no known word is near."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)

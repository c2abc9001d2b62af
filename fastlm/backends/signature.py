"""Arguments by name, and operators that know none: torch.library's take tensors, numbers and lists of them one by one.

A parameter that is annotated with a NamedTuple counts as the tuple's fields here, so that a list of arguments is
written down once, with its types.
"""

import inspect
from collections.abc import Callable
from typing import get_type_hints

from torch import Tensor


class Signature:
    """The parameters of a function, of which some are NamedTuples.

    flat: a function without a body whose parameters are theirs, the fields of NamedTuples in the place of these.
    takes_lists, returns_list: whether it takes, and returns, lists of tensors.
    """

    def __init__(self, function: Callable):
        # of each parameter: its NamedTuple, if it is one, and where its values begin and end when flat
        self._places: list[tuple[type | None, int, int]] = []
        declared, parameters = inspect.signature(function), []
        for name, parameter in declared.parameters.items():
            kind = parameter.annotation if hasattr(parameter.annotation, "_fields") else None
            fields = {name: parameter.annotation} if kind is None else get_type_hints(kind)
            self._places.append((kind, len(parameters), len(parameters) + len(fields)))
            parameters += [
                inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)
                for field, hint in fields.items()
            ]
        self._is_flat = all(kind is None for kind, _, _ in self._places)
        self.takes_lists = any(parameter.annotation == list[Tensor] for parameter in parameters)
        self.returns_list = declared.return_annotation == list[Tensor]
        self.flat = lambda: None
        self.flat.__signature__ = inspect.Signature(parameters, return_annotation=declared.return_annotation)

    def flatten(self, args: tuple) -> tuple:
        """The function's arguments as `flat` takes them."""
        if self._is_flat:
            return args
        values = []
        for arg, (kind, _, _) in zip(args, self._places, strict=True):
            values.extend((arg,) if kind is None else arg)
        return tuple(values)

    def unflatten(self, values: tuple) -> tuple:
        """The way back."""
        if self._is_flat:
            return values
        return tuple(values[at] if kind is None else kind._make(values[at:end]) for kind, at, end in self._places)

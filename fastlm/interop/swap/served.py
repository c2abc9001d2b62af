"""What answers in a module's place."""

import functools
from collections.abc import Callable, Mapping
from typing import ClassVar, NoReturn

from torch import nn

from fastlm.interop.swap.report import Report

WRAPPED = "its forward was wrapped, as by accelerate; swap first"


class Served:
    """The forward of one of transformers' modules, by fastlm. A family derives from it and defines forward, which may
    still call the module's own by super().

    Attributes:
        names: the classes it answers for, as "module.Class".
        parts: who must answer inside it too, for the masks that it hands out are not for others.
        anywhere: whether it may stand in a model that asks transformers' attention interface.
        only_before_5: whether transformers has its classes in a form that it answers for before 5 alone.
        how: what it does, for the report.
        by_interface: whether it asks transformers' attention interface for masks, from transformers 5 on, so that its
            config must name ours.
        notes: what it sets on the module, which goes with it.
        original: the module's own class.
    """

    names: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[type, ...]] = ()
    anywhere: ClassVar[bool] = False
    only_before_5: ClassVar[bool] = False
    how: ClassVar[str] = "fastlm.attention"
    by_interface: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = ()
    original: ClassVar[type]

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module of these classes cannot be served, or None."""
        return None

    def refuse(self, asked: Mapping[str, object], *names: str) -> None:
        """Raise NotImplementedError for an argument that is asked for and not served."""
        for name in names:
            value = asked.get(name)
            if value is not None and value is not False:
                self.refuse_to(f"serve {name}")

    def refuse_to(self, do: str) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} was swapped by fastlm and does not {do}; "
            "fastlm.unswap(model) brings back its own forward, which does"
        )

    def __reduce_ex__(self, protocol):
        """As the module's own, of a class that nobody can import: for pickle and deepcopy."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty, (self.original, self.served), *state


# The class of a module is changed, and nothing else of it: parameters, buffers, hooks, and the attributes that others
# put there stay as they are, isinstance still holds, and a copy or a pickle is swapped as the module is. A forward that
# is set on the instance would be pickled as the name of a method, hide a wrapper that accelerate sets there, or be
# hidden by it. FSDP2 changes classes for the same reasons.


def exchange(module: nn.Module, served: type[Served]) -> None:
    """Let `served` answer for the module."""
    vars(module).pop("forward", None)
    module.__class__ = _class(type(module), served)


def exchange_all(
    served: type[Served], wanted: Callable[[nn.Module], bool], names: Mapping[nn.Module, str], report: Report
) -> None:
    """Let `served` answer for those of a model's modules that are wanted, and say so."""
    for module, name in names.items():
        if not isinstance(module, served):
            if not wanted(module):
                continue
            if why := served.refusal(module):
                report.kept.append((name, why))
                continue
            exchange(module, served)
        report.swapped.append((name, served.how))


def restore(module: nn.Module) -> None:
    """Give the module its own class back."""
    for name in ("forward", *type(module).notes):
        vars(module).pop(name, None)
    module.__class__ = type(module).original


def is_served(module: nn.Module) -> bool:
    """Whether a module's class was made by `exchange`, and not derived from such a class since."""
    return "served" in vars(type(module)) and issubclass(type(module), Served)


def is_wrapped(module: nn.Module) -> bool:
    """Whether the module has a forward of its own that is not its class's; accelerate leaves that when it goes."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


@functools.cache
def _class(original: type, served: type[Served]) -> type:
    """The class that has served's methods before the original's, under the original's name."""

    forward = _like(original.forward, served.forward)
    own = {"forward": forward, "served": served, "original": original, "__doc__": original.__doc__}
    made = type(original.__name__, (served, original), own | {"__module__": original.__module__})
    made.__qualname__ = original.__qualname__
    return made


def _like(original: Callable, served: Callable) -> Callable:
    """served under the original's signature, which trainers read to know what a model takes."""

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return served(self, *args, **kwargs)

    return forward


def _empty(original: type, served: type[Served]) -> Served:
    made = _class(original, served)
    return made.__new__(made)

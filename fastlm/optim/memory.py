"""What training keeps in memory besides activations: parameters, gradients, masters and states, for every optimizer."""

import warnings
from typing import NamedTuple

import torch
from torch import nn

from fastlm.optim import checks
from fastlm.optim.base import OPTIMIZERS, Optimizer
from fastlm.optim.states import MASTERED, MASTERS, master_of

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}


class Row(NamedTuple):
    """Bytes that one choice of optimizer and master keeps; total is their sum."""

    optimizer: str
    master: str | None
    parameters: int
    gradients: int
    masters: int
    states: int
    chosen: bool

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.masters + self.states


class MemoryTable(list[Row]):
    """Rows, printed as a table in the unit that suits the smallest total, with bytes per parameter of the model."""

    def __init__(self, rows: list[Row], elements: int):
        super().__init__(rows)
        self.elements = elements

    def __str__(self) -> str:
        least = min((r.total for r in self), default=0)
        unit, size = next(((unit, size) for unit, size in UNITS.items() if least >= size), ("B", 1.0))

        def shown(count: float) -> str:
            return f"{count / size:.{0 if unit == 'B' else 1}f}"

        heads = "".join(f"{head:>9} " for head in ("params", "grads", "masters", "states"))
        lines = [f"{'optimizer':<10} {'master':<11} {heads}{f'total {unit}':>10}  bytes/param"]
        for r in self:
            sizes = "".join(f"{shown(count):>9} " for count in (r.parameters, r.gradients, r.masters, r.states))
            mark = "  ← chosen" if r.chosen else ""
            each = r.total / max(1, self.elements)
            lines.append(
                f"{r.optimizer:<10} {r.master or '-':<11} {sizes}{shown(r.total):>10}  {each:<5.2f}{mark}".rstrip()
            )
        return "\n".join(lines)


def memory_table(
    model: nn.Module, optimizers: str | tuple[str, ...] | None = None, chosen: torch.optim.Optimizer | None = None
) -> MemoryTable:
    """Bytes of parameters, gradients, masters and states, for every optimizer and every master this model can have.

    Nothing is allocated. Gradients are counted in the parameters' dtype; frozen parameters have neither gradient nor
    state. Each optimizer has its default options.

    Args:
        model: a module.
        optimizers: one name of OPTIMIZERS, or several. None: every optimizer of fastlm.
        chosen: the optimizer that the model has. If it is of fastlm, its row has its own options and is marked.

    Returns:
        A list of `Row`; print(memory_table(model)) shows it as a table.

    Raises:
        ValueError: for an unknown name, and for parameters that fastlm's optimizers do not train.
    """
    known = sorted(name for name, cls in OPTIMIZERS.items() if isinstance(cls, type) and issubclass(cls, Optimizer))
    names = known if optimizers is None else [optimizers] if isinstance(optimizers, str) else list(optimizers)
    for name in names:
        checks.one_of(known, optimizer=name)
    mark = None if chosen is None else _choice(chosen)
    params = list(model.parameters())
    trained = [p for p in params if p.requires_grad]
    dtypes = {p.dtype for p in trained}
    masters = [
        m
        for m in MASTERS
        if m is None or (dtypes & {torch.bfloat16, torch.float16} and not (m != "fp32" and torch.float16 in dtypes))
    ]
    rows = []
    for name in names:
        for master in masters if trained else [None]:
            is_chosen = mark == (name, master)
            optimizer = chosen if is_chosen else _of_defaults(name, trained, master) if trained else None
            rows.append(Row(name, master, _bytes(params), _bytes(trained), *_state_bytes(optimizer), is_chosen))
    return MemoryTable(rows, sum(p.numel() for p in params))


def _of_defaults(name: str, params: list, master: str | None) -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Adafactor's: bytes do not depend on which of two variants is meant
        return OPTIMIZERS[name](params, master=master)


def _choice(optimizer: torch.optim.Optimizer) -> tuple[str, str | None] | None:
    """The name of an optimizer's class, or of the one that a trainer's wrapper derives from, and the
    `master` of its first parameter; None for one that is not of fastlm.
    """
    if not isinstance(optimizer, Optimizer):
        return None
    names = {cls: name for name, cls in OPTIMIZERS.items()}
    known = [names[cls] for cls in type(optimizer).__mro__ if cls in names]
    if not known:
        raise ValueError(
            f"chosen is of {type(optimizer)}, whose states are not known here; give an optimizer of fastlm.optim, "
            "or None"
        )
    group = optimizer.param_groups[0]
    return known[0], master_of(group["params"][0], group)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _state_bytes(optimizer: Optimizer | None) -> tuple[int, int]:
    """(masters, states) from what each parameter's state will look like; nothing is allocated."""
    if optimizer is None:
        return 0, 0
    specs = [optimizer.full_state_specs(p, group) for group in optimizer.param_groups for p in group["params"]]
    sizes = [(name, x.shape.numel() * x.dtype.itemsize) for each in specs for name, x in each.items()]
    masters = sum(size for name, size in sizes if name in MASTERED)
    return masters, sum(size for _, size in sizes) - masters

"""Linear layers of few rows, as when a text is written on a CPU, to which matrix libraries give one thread
(benchmarks/FACTS.md).
"""

from torch import Tensor, nn

from fastlm.interop.swap.report import Report
from fastlm.interop.swap.served import WRAPPED, Served, exchange_all, is_wrapped
from fastlm.nn.linear import linear


class FewRows(Served):
    """torch.nn.Linear. A subclass, which may compute something else, stays itself."""

    how = "fastlm.nn.linear: of few rows it reads its weight once, on all threads"

    @classmethod
    def refusal(cls, module: nn.Linear) -> str | None:
        return WRAPPED if is_wrapped(module) else None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def swap_linears(names: dict[nn.Module, str], report: Report) -> None:
    """Those among a model's modules, and say so."""
    exchange_all(FewRows, lambda module: type(module) is nn.Linear, names, report)

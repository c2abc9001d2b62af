"""Embeddings of many words, or of 16 bits, whose gradients PyTorch takes longer for, or sums in 16 bits
(benchmarks/FACTS.md).
"""

from torch import Tensor, nn

from fastlm.interop.swap.report import Report
from fastlm.interop.swap.served import WRAPPED, Served, exchange_all, is_wrapped
from fastlm.nn.embedding import embedding
from fastlm.ops.embedding import gains


class Words(Served):
    """torch.nn.Embedding. A subclass, which may scale its rows, stays itself."""

    how = "fastlm.embedding: its gradient is summed in fp32, in the order of tokens"

    @classmethod
    def refusal(cls, module: nn.Embedding) -> str | None:
        options = ("max_norm", "scale_grad_by_freq", "sparse")
        if asked := next((name for name in options if getattr(module, name)), None):
            return f"its {asked} is {getattr(module, asked)!r}, which fastlm.embedding has not"
        return WRAPPED if is_wrapped(module) else None

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight, self.padding_idx)


def swap_embeddings(names: dict[nn.Module, str], report: Report) -> None:
    """Those among a model's modules, and say so."""
    exchange_all(Words, lambda module: type(module) is nn.Embedding and gains(module.weight), names, report)

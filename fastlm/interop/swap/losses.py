"""The loss of models that predict words: while they train with labels no logits are made for it, nor for positions
without a label.

Their head then answers with `Logits`, which the model hands on to its loss as it would a tensor.
"""

from torch import Tensor, nn

from fastlm.interop.swap.logits import Logits
from fastlm.interop.swap.report import Report
from fastlm.interop.swap.served import WRAPPED, Served, exchange, is_served, is_wrapped
from fastlm.nn.linear import linear


class Head(Served):
    """A linear layer that may be told to answer with `Logits`."""

    how = "logits where they are looked at"
    deferred = False
    notes = ("deferred",)

    def forward(self, input: Tensor) -> Tensor | Logits:
        return Logits.of(self, input) if self.deferred else linear(input, self.weight, self.bias)


class WithLoss(Served):
    """A model whose loss is computed without logits while it trains; its output has None for them then."""

    how = "fastlm.linear_cross_entropy: no logits while it trains with labels"

    @classmethod
    def refusal(cls, module) -> str | None:
        head = module.get_output_embeddings()
        if isinstance(head, Head) or (type(head) is nn.Linear and not is_wrapped(head)):
            return None
        return f"its head is a {type(head).__name__} that is wrapped or no torch.nn.Linear"

    def forward(self, *args, **kwargs):
        head = self.get_output_embeddings()
        asked = kwargs.get("labels") is None or kwargs.get("logits_to_keep") or not self.training
        if asked or not is_served(head) or head._forward_hooks or head._forward_pre_hooks or is_wrapped(head):
            return super().forward(*args, **kwargs)
        head.deferred = True
        try:
            output = super().forward(*args, **kwargs)
        finally:
            head.deferred = False
        if isinstance(output, tuple):
            return tuple(_looked_at(x) for x in output)
        return type(output)(**{name: _looked_at(x) for name, x in output.items()})


def _looked_at(x):
    return x.made if isinstance(x, Logits) else x


def swap_losses(names: dict[nn.Module, str], report: Report) -> None:
    """Those of models of transformers that predict words, and say so. A head may be that of a model inside it too."""
    for model, name in names.items():
        head = model.get_output_embeddings()
        if head is None:
            continue
        if is_served(model):
            report.swapped.append((name, WithLoss.how))
        elif why := WRAPPED if is_wrapped(model) else WithLoss.refusal(model):
            report.kept.append((name, why))
        else:
            if not is_served(head):
                exchange(head, Head)
            exchange(model, WithLoss)
            report.swapped.append((name, WithLoss.how))

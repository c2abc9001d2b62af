"""The loss of models that predict words: while they train with labels no logits are made for it, nor for positions
without a label.

Their head then answers with `Logits`, which the model hands on to its loss as it would a tensor.
"""

from torch import Tensor, nn

from fastlm.interop.swap.logits import Logits
from fastlm.interop.swap.served import Served, exchange, is_served, is_wrapped


class Head(Served):
    """A linear layer that may be told to answer with `Logits`."""

    how = "logits where they are looked at"
    deferred = False
    notes = ("deferred",)

    def forward(self, input: Tensor) -> Tensor | Logits:
        return Logits.of(self, input) if self.deferred else super().forward(input)


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


def serve_loss(model: nn.Module) -> None:
    """Of a model that `WithLoss` does not refuse. The head may be that of a model inside it, which is served too."""
    if not is_served(model.get_output_embeddings()):
        exchange(model.get_output_embeddings(), Head)
    exchange(model, WithLoss)


def predicts_words(model: nn.Module) -> bool:
    """Whether a model of transformers has a head over its vocabulary."""
    return model.get_output_embeddings() is not None

"""The loss of models that write: the cross entropy of the next token, for which training makes no logits.

While a model trains with labels its head hands on the states that it is given, and its loss function multiplies them by
the head's weight in chunks. That holds where nothing stands between the two, as in the models that are named here.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.interop.swap.served import Served, is_served, is_wrapped
from fastlm.nn.loss import linear_cross_entropy

# Directory of transformers.models, and the class; each was read in 4.57 and in 5.
NAMES = {
    "bloom": "BloomForCausalLM", "gemma": "GemmaForCausalLM", "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "mpt": "MptForCausalLM", "olmo2": "Olmo2ForCausalLM", "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip


class Head(Served):
    """A linear layer that may be told to hand on what it is given."""

    how = "left out where the loss needs it alone"
    deferred = False
    notes = ("deferred",)

    def forward(self, input: Tensor) -> Tensor:
        return input if self.deferred else super().forward(input)


class CausalLM(Served):
    """A model whose loss is computed without logits while it trains; its output has None for them then."""

    names = tuple(f"transformers.models.{folder}.modeling_{folder}.{name}" for folder, name in NAMES.items())
    how = "fastlm.linear_cross_entropy: no logits while it trains with labels"

    @classmethod
    def refusal(cls, module) -> str | None:
        head = module.get_output_embeddings()
        if type(head) is not nn.Linear or is_wrapped(head):
            return f"its head is a {type(head).__name__} that is wrapped or no torch.nn.Linear"
        return None if _is_theirs(module.loss_function) else "its loss function is not transformers' ForCausalLMLoss"

    @property
    def loss_function(self):
        own = super().loss_function
        return self._loss if getattr(self.get_output_embeddings(), "deferred", False) else own

    @loss_function.setter
    def loss_function(self, value) -> None:
        self.original.loss_function.fset(self, value)

    def forward(self, *args, **kwargs):
        head = self.get_output_embeddings()
        needed = kwargs.get("labels") is None or kwargs.get("logits_to_keep") or not self.training
        if needed or not self.as_it_was_swapped(head):
            return super().forward(*args, **kwargs)
        head.deferred = True
        try:
            output = super().forward(*args, **kwargs)
        finally:
            head.deferred = False
        if isinstance(output, tuple):
            return output[0], None, *output[2:]
        output.logits = None
        return output

    def as_it_was_swapped(self, head: nn.Module) -> bool:
        """Whether nothing was put in since that must be called as it is: another head, its hooks, another loss."""
        if not is_served(head) or head._forward_hooks or head._forward_pre_hooks or is_wrapped(head):
            return False
        return _is_theirs(super().loss_function)

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size=None, num_items_in_batch=None, ignore_index: int = -100,
        shift_labels: Tensor | None = None, **kwargs,
    ) -> Tensor:  # fmt: skip
        """transformers' ForCausalLMLoss, of states [B, L, dim] in place of logits."""
        head = self.get_output_embeddings()
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = linear_cross_entropy(
            logits.flatten(0, -2), head.weight, shift_labels.flatten().to(logits.device), head.bias,
            ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def _is_theirs(loss: object) -> bool:
    return getattr(loss, "__qualname__", None) == "ForCausalLMLoss"

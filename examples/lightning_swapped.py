"""A Mistral of transformers in Lightning, with fastlm inside: attention in sliding windows, RMS norms in a pass each
way, the loss without logits, and the optimizer; CPU, some seconds.

    python examples/lightning_swapped.py

Needs: pip install fastlm transformers lightning
"""

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import MistralConfig, MistralForCausalLM

import fastlm

WORDS, LENGTH, WINDOW = 40, 24, 8


class LanguageModel(lightning.LightningModule):
    def __init__(self, swapped: bool):
        super().__init__()
        config = MistralConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=WINDOW,
        )  # fmt: skip
        self.model, self.losses = MistralForCausalLM(config), []
        if swapped:
            print(fastlm.swap(self.model))

    def training_step(self, words: Tensor) -> Tensor:
        loss = self.model(input_ids=words, labels=words, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return fastlm.optim.AdamW(self.parameters(), lr=3e-3, max_grad_norm=1.0)


def train(swapped: bool = True, steps: int = 40) -> list[float]:
    """The loss of every step."""
    lightning.seed_everything(0, verbose=False)
    model = LanguageModel(swapped)
    # words that follow one another, from one drawn for each row
    rows = (torch.randint(WORDS, (16 * steps, 1)) + torch.arange(LENGTH)) % WORDS
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    lightning.Trainer(accelerator="cpu", max_steps=steps, **quiet).fit(model, DataLoader(rows, batch_size=16))
    return model.losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

"""A BLOOM of transformers in a loop of one's own with accelerate, with fastlm inside: ALiBi without an L×L tensor, the
loss without logits, and the optimizer's one pass; CPU, some seconds.

    python examples/accelerate_loop.py

Needs: pip install fastlm transformers accelerate
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BloomConfig, BloomForCausalLM, set_seed

import fastlm

WORDS, LENGTH = 40, 24


def train(swapped: bool = True, steps: int = 40) -> list[float]:
    """The loss of every update, each of two micro-batches of 8 rows."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    config = BloomConfig(vocab_size=WORDS, hidden_size=64, n_layer=2, n_head=4, use_cache=False)
    model = BloomForCausalLM(config)
    if swapped:
        print(fastlm.swap(model))  # before accelerate wraps it
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    # words that follow one another, from one drawn for each row
    rows = (torch.randint(WORDS, (16 * steps, 1)) + torch.arange(LENGTH)) % WORDS
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=8))
    model.train()
    losses = []
    for words in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=words, labels=words).loss
            accelerator.backward(loss)
            optimizer.step()  # which clips, where all micro-batches are in
            optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses).view(-1, 2).mean(1).tolist()


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

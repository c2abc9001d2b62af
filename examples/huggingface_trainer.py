"""fastlm's optimizers in Hugging Face's Trainer, on a tiny Llama and synthetic text; CPU, a few seconds.

    python examples/huggingface_trainer.py            Adafactor, the steps of transformers.Adafactor
    python examples/huggingface_trainer.py adamw      AdamW, the steps of torch.optim.AdamW

Needs: pip install fastlm transformers accelerate
"""

import sys
import tempfile
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_constant_schedule, set_seed

import fastlm

CLIP = 1.0
OPTIMIZERS = {
    "adafactor": lambda params: fastlm.optim.Adafactor(params, lr=3e-3, scale_parameter=False, max_grad_norm=CLIP),
    "adamw": lambda params: fastlm.optim.AdamW(params, lr=3e-3, weight_decay=0.1, max_grad_norm=CLIP),
}


def train(make_optimizer: Callable, steps: int = 20, clip: float = 0.0) -> list[float]:
    """The loss of every step. clip: Trainer's own max_grad_norm; 0 leaves clipping to the optimizer, which does it in
    its one pass."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    # each row counts in its own step
    ids = (torch.arange(16) * torch.arange(1, 9)[:, None] + torch.arange(8)[:, None]) % 32
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(steps, 1)]
    optimizer = make_optimizer(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, max_grad_norm=clip, logging_steps=1, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=data, optimizers=(optimizer, get_constant_schedule(optimizer))
        )
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "adafactor"
    if name not in OPTIMIZERS:
        sys.exit(f"optimizer {name!r} is unknown; choose from {', '.join(OPTIMIZERS)}")
    losses = train(OPTIMIZERS[name])
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

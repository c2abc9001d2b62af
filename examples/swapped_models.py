"""A T5 and a BERT of transformers in Hugging Face's Trainer, with fastlm inside: the same losses, but no L×L tensor for
positions and no logits.

    python examples/swapped_models.py            T5 learns to write a row backwards; CPU, some seconds
    python examples/swapped_models.py bert       BERT learns to fill gaps

Needs: pip install fastlm transformers accelerate
"""

import sys
import tempfile

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    get_constant_schedule,
    set_seed,
)

import fastlm

WORDS, MASK, LENGTH = 40, 1, 12


def rows() -> torch.Tensor:
    """[640, LENGTH] int64: words that follow one another, from one drawn for each row."""
    return 2 + (torch.randint(WORDS - 2, (640, 1)) + torch.arange(LENGTH)) % (WORDS - 2)


def t5() -> tuple[PreTrainedModel, list[dict]]:
    config = T5Config(
        vocab_size=WORDS, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), [{"input_ids": row, "labels": row.flip(0)} for row in rows()]


def bert() -> tuple[PreTrainedModel, list[dict]]:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    words = rows()
    hidden = torch.rand(words.shape) < 0.2
    given, labels = words.masked_fill(hidden, MASK), words.masked_fill(~hidden, -100)
    return BertForMaskedLM(config), [{"input_ids": x, "labels": y} for x, y in zip(given, labels, strict=True)]


MODELS = {"t5": t5, "bert": bert}


def train(name: str, swapped: bool = True, steps: int = 40) -> list[float]:
    """The loss of every step."""
    set_seed(0)
    model, data = MODELS[name]()
    if swapped:
        print(fastlm.swap(model))
    optimizer = fastlm.optim.Adafactor(model.parameters(), lr=3e-3, scale_parameter=False, max_grad_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, max_grad_norm=0, logging_steps=1, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=data, optimizers=(optimizer, get_constant_schedule(optimizer))
        )
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "t5"
    if name not in MODELS:
        sys.exit(f"model {name!r} is unknown; choose from {', '.join(MODELS)}")
    losses = train(name)
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

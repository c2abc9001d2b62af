"""A Llama of transformers that reads further than it was trained to, by Position Interpolation (Chen et al. 2023):
trained on short rows, opened with transformers' own scaling of its rotary positions, tuned for some steps. Attention,
RMS norms, loss and optimizer are fastlm's; CPU, under a minute.

    python examples/longer_context.py

Needs: pip install fastlm transformers
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import fastlm

WORDS, TRAINED, FACTOR = 32, 32, 4
LONG = FACTOR * TRAINED


def llama(factor: float = 1.0) -> LlamaForCausalLM:
    """Positions are divided by factor."""
    scaling = {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TRAINED, rope_parameters=scaling, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fastlm.swap(model)
    return model


def rows(n: int, L: int, draw: torch.Generator) -> torch.Tensor:
    """[n, L] int64: each word is one of the two before it, plus one, by chance."""
    words = torch.randint(WORDS, (n, L), generator=draw)
    back = torch.randint(1, 3, (n, L), generator=draw)
    for i in range(2, L):
        words[:, i] = (words.gather(1, (i - back[:, i])[:, None])[:, 0] + 1) % WORDS
    return words


def train(model: LlamaForCausalLM, L: int, steps: int, batch: int, seed: int) -> LlamaForCausalLM:
    model.train()
    optimizer, draw = fastlm.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        words = rows(batch, L, draw)
        model(input_ids=words, labels=words, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, L: int) -> float:
    """Of the last TRAINED / 2 words of rows of L."""
    words = rows(64, L, torch.Generator().manual_seed(9))
    hidden = torch.arange(L) < L - TRAINED // 2
    return model.eval()(input_ids=words, labels=words.masked_fill(hidden, -100)).loss.exp().item()

"""A Llama of transformers that reads sixteen times further than it was trained to, by Position Interpolation (Chen et
al. 2023): trained on short rows, opened again with transformers' own scaling of rotary positions. Attention, RMS norms,
loss and optimizer are fastlm's; CPU, under a minute.

    python examples/longer_context.py

Needs: pip install fastlm transformers
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import fastlm

TRAINED, FACTOR = 32, 16
NOISE, KEYS, QUESTION = 32, 31, 63  # words below NOISE, KEYS of them from there on, and the last one


def llama(factor: float = 1.0) -> LlamaForCausalLM:
    """factor: what positions are divided by."""
    config = LlamaConfig(
        vocab_size=NOISE + KEYS + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TRAINED, use_cache=False, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": factor},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fastlm.swap(model)
    return model


def rows(n: int, L: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and labels [n, L] int64: noise with a key somewhere, the question, and the key again, which is asked."""
    words = torch.randint(NOISE, (n, L), generator=draw)
    key = torch.randint(NOISE, NOISE + KEYS, (n, 1), generator=draw)
    words.scatter_(1, torch.randint(L - 2, (n, 1), generator=draw), key)
    words[:, -2], words[:, -1:] = QUESTION, key
    return words, words.masked_fill(torch.arange(L) < L - 1, -100)


def train(steps: int = 150) -> LlamaForCausalLM:
    set_seed(0)
    model, draw = llama().train(), torch.Generator().manual_seed(1)
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    for _ in range(steps):
        words, labels = rows(32, TRAINED, draw)
        model(input_ids=words, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def interpolated(model: LlamaForCausalLM) -> LlamaForCausalLM:
    longer = llama(FACTOR)
    longer.load_state_dict(model.state_dict())
    return longer


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, L: int) -> float:
    """Of the key, over 128 rows of L words; 31 would be guessing among them."""
    words, labels = rows(128, L, torch.Generator().manual_seed(2))
    return model.eval()(input_ids=words, labels=labels).loss.exp().item()


if __name__ == "__main__":
    model = train()
    longer = interpolated(model)
    for L in (TRAINED, 4 * TRAINED, 8 * TRAINED, FACTOR * TRAINED):
        print(f"L {L:3}: perplexity {perplexity(model, L):6.2f}, interpolated {perplexity(longer, L):.2f}")

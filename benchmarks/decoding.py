"""Who competes in decoding: 64 tokens written after 128, greedily, by GPT-2 with a cache.

fastlm                    generate
transformers generate     its function of that name
transformers loop         its model called token by token without it
"""

from collections.abc import Callable

import torch
from models import OURS, THEIRS, VOCABULARY, theirs
from timing import compare
from torch import Tensor

from fastlm.interop import from_huggingface

PROMPT, WRITTEN = 128, 64


def writers(B: int, n: int, **size) -> dict[str, Callable[[], Tensor]]:
    """Of each way to decode, what writes n tokens after each of B prompts and returns them, [B, n]."""
    model = theirs("gpt2", **size).eval()
    ours = from_huggingface(model)
    prompt = torch.randint(VOCABULARY, (B, PROMPT), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(prompt)
    options = dict(max_new_tokens=n, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def loop() -> Tensor:
        new, cache, written = prompt, None, []
        for _ in range(n):
            out = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            new, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            written.append(new)
        return torch.cat(written, 1)

    return {
        OURS: lambda: ours.generate(prompt, n, temperature=0.0)[:, PROMPT:],
        f"{THEIRS} generate": lambda: model.generate(prompt, attention_mask=real, **options)[:, PROMPT:],
        f"{THEIRS} loop": loop,
    }


def measure(B: int, clock: str = "clock", smoke: bool = False, layers: int | None = None, **limits) -> dict:
    """One row of results: decoding."""
    n = 4 if smoke else WRITTEN
    runs = writers(B, n, smoke=smoke, layers=layers)
    expected = runs[OURS]()
    for name, run in runs.items():
        assert torch.equal(run(), expected), f"{name} writes other tokens"
    row = compare({name: lambda run=run: [run] for name, run in runs.items()}, clock, **limits)
    return row.row(kind="models", step="decode", model="gpt2", B=B, L=PROMPT, written=n, peak={})

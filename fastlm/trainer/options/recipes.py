"""Whole recipes by name, as flags of `fastlm pretrain --config NAME`. To add one, add a row."""

import math

TOKENS = 300e9  # that GPT-3 saw
MICRO_BATCH = 16  # rows of 2048 tokens, the 32 k with which its batches begin

# of each size its peak rate, the micro-batches of a full batch (Brown et al. 2020, table 2.1), and the tokens over
# which the batch grows: 4 to 12 billion "depending on the model size", which is here 12 for the largest
_GPT3 = {
    "125m": (6.0e-4, 16, 4e9),
    "350m": (3.0e-4, 16, 4e9),
    "760m": (2.5e-4, 16, 4e9),
    "1.3b": (2.0e-4, 32, 4e9),
    "2.7b": (1.6e-4, 32, 4e9),
    "6.7b": (1.2e-4, 64, 4e9),
    "13b": (1.0e-4, 64, 4e9),
    "175b": (0.6e-4, 98, 12e9),
}


def _gpt3(preset: str, **sizes: object) -> dict[str, object]:
    """App. B of Brown et al. 2020, for a model of any size: shares of a run instead of tokens."""
    return {
        "preset": preset, "optimizer": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1, "clip": 1.0, "dropout": 0.0,
        "schedule": "cosine", "schedule_options": [f"until={260 / 300:.4f}"], "schedule_by": "tokens",
        "warmup": 375e6 / TOKENS, "min_lr_ratio": 0.1, **sizes,
    }  # fmt: skip


def _of_size(lr: float, micro_batches: int, ramp: float) -> dict[str, object]:
    """Steps and the share of them on which batches grow: with the batch in proportion to A^(s / R), R updates see
    R · (A - 1) / ln A micro-batches.
    """
    tokens = 2048 * MICRO_BATCH
    growing = ramp / tokens * math.log(micro_batches) / (micro_batches - 1)
    steps = growing + (TOKENS - ramp) / (tokens * micro_batches)
    sizes = {"lr": lr, "batch": MICRO_BATCH, "accumulate": micro_batches, "context": 2048}
    return sizes | {"steps": round(steps), "batch_ramp": growing / steps}


RECIPES: dict[str, dict[str, object]] = {
    # a laptop's, over the minutes there are: GPT-3's shares, but a warmup that a short run has too
    "gpt3": _gpt3("gpt3", batch=4, accumulate=4, batch_ramp=0.05, warmup=0.02),
    **{f"gpt3-{size}": _gpt3(f"gpt3-{size}", **_of_size(*row)) for size, row in _GPT3.items()},
}

"""What each family's small model learns of Python's own sources in so many updates, beside what guessing would reach.

    python benchmarks/learning.py [PRESET ...] [--seconds 95] [--steps N] [--seeds 0 1 2] [--threads 2]

One run a seed, of --steps updates, or of as many as the first ones say fit into --seconds: 95 of the two minutes that
`fastlm pretrain` takes go to updates. Said are the held-out loss over all windows beside guessing tokens by frequency,
and what else tells whether a model learned: accuracies; of replaced tokens F1, beside that of calling all of them
replaced; whether the answer has a text's sentinels in their order; how many edits a denoised text is from the true one,
beside its input.
"""

import argparse
import time

import numpy as np
import torch

from fastlm.models.presets import FAMILIES
from fastlm.objectives import Denoising, Objective, ReplacedTokens, SpanCorruption
from fastlm.objectives.denoising import real
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import Tokens, tokenize
from fastlm.trainer.options.config import Config
from fastlm.trainer.step import Trainer

WRITTEN = 32  # held-out rows for which texts are written


def train(config: Config, tokens: Tokens, steps: int) -> Trainer:
    trainer = Trainer(config, tokens, steps)
    while trainer.step < steps:
        trainer.update()
    return trainer


def steps_in(config: Config, tokens: Tokens, seconds: float) -> int:
    """How many updates fit into so many seconds, by the time of ten."""
    trainer = Trainer(config, tokens, 1000)
    trainer.update()
    begun = time.perf_counter()
    for _ in range(10):
        trainer.update()
    return int(10 * seconds / (time.perf_counter() - begun))


def learned(trainer: Trainer, found: dict[str, float]) -> list[str]:
    """What tells a person whether the model learned, besides the loss that is compared."""
    objective = trainer.held_out
    said = [f"{name} {found[name]:.1%}" for name in objective.shares if name not in ("precision", "recall", "replaced")]
    if objective.reports_bits_per_byte:
        said.append(f"{found['bits_per_byte']:.3f} bits/byte")
    if isinstance(objective, ReplacedTokens):
        p, r, base = found["precision"], found["recall"], found["replaced"]
        said.append(f"F1 {2 * p * r / max(p + r, 1e-9):.3f}, all replaced {2 * base / (1 + base):.3f}")
    if isinstance(objective, SpanCorruption):
        said.append(f"sentinels in order {sentinels_in_order(trainer.model, objective):.0%}")
    if isinstance(objective, Denoising):
        before, after = edits(trainer.model, objective)
        said.append(f"edits {before:.1f} → {after:.1f}")
    return said


@torch.no_grad()
def sentinels_in_order(model: torch.nn.Module, objective: SpanCorruption) -> float:
    """The share of rows for which the text written greedily has the input's sentinels, all of them in their order."""
    inputs, known = chosen(objective)["inputs"], objective.vocabulary
    length = objective.label_length
    written = model.generate(inputs, length, 0.0, eos=known.eos, pad=known.pad, start=known.pad)
    of = lambda ids: [i for i in ids.tolist() if i >= known.size]
    return np.mean([of(x) == of(y) for x, y in zip(inputs, written, strict=True)])


@torch.no_grad()
def edits(model: torch.nn.Module, objective: Denoising) -> tuple[float, float]:
    """Tokens put in, taken out or changed between the true text and (the spoiled one, the one written greedily)."""
    batch, known = chosen(objective), objective.vocabulary
    ends = dict(eos=known.eos, pad=known.pad, start=known.pad)
    written = model.generate(batch["inputs"], objective.context, 0.0, attention_mask=real(batch), **ends)
    text = lambda row: [i for i in row.tolist() if i not in (known.pad, known.eos)]
    each = zip(*(map(text, rows) for rows in (batch["labels"], batch["inputs"], written)), strict=True)
    return tuple(np.mean([(distance(true, x), distance(true, y)) for true, x, y in each], 0))


def distance(a: list[int], b: list[int]) -> int:
    """Levenshtein's."""
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        before, row = row, np.empty_like(row)
        row[0] = i
        for j, y in enumerate(b, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
    return int(row[-1])


def chosen(objective: Objective) -> dict[str, torch.Tensor]:
    """Held-out rows, spread evenly."""
    return objective.fixed(np.arange(WRITTEN) * objective.windows // WRITTEN)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("presets", nargs="*", default=[name for name in FAMILIES if not name.endswith("generator")])
    ask.add_argument("--seconds", type=float, default=95)
    ask.add_argument("--steps", type=int)
    ask.add_argument("--seeds", type=int, nargs="*", default=[0])
    ask.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = ask.parse_args()
    torch.set_num_threads(asked.threads)
    tokens = tokenize(find(()), Config().vocab)
    for preset in asked.presets:
        for seed in asked.seeds:
            config = Config(preset=preset, seed=seed).settled()
            trainer = train(config, tokens, asked.steps or steps_in(config, tokens, asked.seconds))
            found, compared = trainer.evaluate(), trainer.held_out.compared
            row = preset, trainer.held_out.name, f"seed {seed}", f"{trainer.steps:,} steps"
            row += f"{tokens.facts.unigram_nats:.3f} → {found[compared]:.3f}", *learned(trainer, found)
            print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()

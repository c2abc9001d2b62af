"""What making a batch costs beside the update that learns from it, for each family's own objective at its laptop size.

    python benchmarks/objectives.py [PRESET ...]

Process time of one thread, a batch and an update in turn, medians; the text is Python's own sources.
"""

import argparse
import statistics
import time

import torch

from fastlm.models.presets import FAMILIES
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import Tokens, tokenize
from fastlm.trainer.options.config import Config
from fastlm.trainer.step import Trainer

WARMUP = 2


def measure(config: Config, tokens: Tokens, rounds: int) -> tuple[str, float, float]:
    """The objective's name, and the median seconds of making a batch and of an update without that."""
    trainer = Trainer(config, tokens, steps=rounds + WARMUP)
    making, updating = [], []
    for i in range(rounds + WARMUP):
        begun = time.process_time()
        trainer.train.batch(config.seed, i * config.batch, config.batch)
        made = time.process_time()
        trainer.update()
        making.append(made - begun)
        updating.append(time.process_time() - made - making[-1])
    return trainer.train.name, *(statistics.median(times[WARMUP:]) for times in (making, updating))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("presets", nargs="*", default=[name for name in FAMILIES if not name.endswith("generator")])
    ask.add_argument("--rounds", type=int, default=10)
    asked = ask.parse_args()
    torch.set_num_threads(1)
    tokens = tokenize(find((), "text"), Config().vocab)
    print(f"{'preset':<16}{'objective':<18}{'batch, ms':>10}{'update, ms':>12}{'share':>8}")
    for preset in asked.presets:
        name, made, updated = measure(Config(preset=preset, threads=1).settled(), tokens, asked.rounds)
        print(f"{preset:<16}{name:<18}{1e3 * made:>10.2f}{1e3 * updated:>12.1f}{made / updated:>8.1%}", flush=True)


if __name__ == "__main__":
    main()

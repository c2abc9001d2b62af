"""What a trained model gives a task, beside the same model drawn anew: the task that `fastlm finetune` has by itself.

    python benchmarks/finetuning.py DIR [--lr 1e-3 3e-4 ...] [--seeds 0 1 2] [--epochs 3]

DIR is a run of `fastlm pretrain`. Said are, for each rate and seed, the held-out accuracy of both, what always saying
one label reaches, and the process time of the updates.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastlm.trainer.commands.finetune import read
from fastlm.trainer.commands.start import Start, open_start
from fastlm.trainer.options.finetune import FineTune
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.step import Trainer
from fastlm.trainer.tasks.examples import Examples


def accuracy(config: FineTune, rows: Examples, start: Start | None) -> tuple[float, float]:
    """Of the held-out rows, and seconds of process time of all updates."""
    trainer = Trainer(config, rows, config.steps)
    if start is not None:
        start.give(trainer.train, trainer.model)
    begun = time.process_time()
    while trainer.step < config.steps:
        trainer.update()
    return trainer.evaluate()["accuracy"], time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lr", type=float, nargs="+", default=[None])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = open_start(asked.folder, (), print)
    for lr in asked.lr:
        for seed in asked.seeds:
            config = FineTune(folder=asked.folder, lr=lr, seed=seed, epochs=asked.epochs)
            config = replace(config, shape=asdict(start.opened.model.config)).settled()
            config, rows = read(config, Console(), start.tokenizer_file, None)
            (trained, seconds), (anew, _) = (accuracy(config, rows, begin) for begin in (start, None))
            always = f"{rows.baseline.constant} {rows.baseline.value:.1%}"
            print(
                f"lr {config.lr:.2g}, seed {seed}: trained {trained:.1%}, drawn anew {anew:.1%}, {always}; "
                f"{config.steps} steps in {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""A training step whose loss makes no logits beside one by logits, which is what the objectives learn from: time, and
how much a process grows in its first step.

    python benchmarks/losses.py                     # GPT-2-small's width, two layers, one row of 1,024 tokens
    python benchmarks/losses.py --default           # the models of `fastlm pretrain` by their presets, as they train

Process time of one thread, in turn, medians with the 20th and 80th percentile; losses are compared first.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import peak_growth
from timing import compare
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.objectives import IGNORED, base
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.options.config import Config
from fastlm.trainer.step import Trainer

WORDS, L = (32000, 50257), 1024
PRESETS = ("gpt", "llama", "bert", "electra", "t5")
WAYS = OURS, LOGITS = "without logits", "by logits"


@contextmanager
def losing(way: str) -> Iterator[None]:
    """In the `with` block objectives' losses are made so."""
    ours = base.linear_cross_entropy

    def by_logits(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **options) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, **options)

    base.linear_cross_entropy = ours if way == OURS else by_logits
    try:
        yield
    finally:
        base.linear_cross_entropy = ours


def large(V: int) -> Callable[[], Tensor]:
    """A step of two layers of GPT-2-small, forward and backward."""
    torch.manual_seed(0)
    model = Transformer(preset("gpt2", layers=2, vocab_size=V, context=L, dropout=0.0))
    tokens, labels = torch.randint(V, (2, 1, L), generator=torch.Generator().manual_seed(1)).unbind()
    assert IGNORED not in labels

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = base.summed_cross_entropy(model.head.factors(model.states(tokens)), labels)
        (loss / L).backward()
        return loss.detach()

    return step


def compared(name: str, steps: dict[str, Callable], rounds: int) -> None:
    def timed(way: str) -> Callable:
        def once() -> None:
            with losing(way):
                steps[way]()

        return once

    contestants = {way: lambda way=way: [timed(way)] for way in WAYS}
    found = compare(contestants, "process", rounds=rounds, budget=600, batch=1e-3)
    ratio, seconds = found.ratio[LOGITS], found.seconds[OURS]
    print(
        f"{name:<24}{1e3 * seconds.median:>10.1f} ms{ratio.median:>8.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}]",
        flush=True,
    )


def growth(V: int, way: str) -> float:
    """MiB, in a process of its own."""
    command = [sys.executable, __file__, "--grow", str(V), way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--default", action="store_true")
    ask.add_argument("--rounds", type=int, default=7)
    ask.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    asked = ask.parse_args()
    torch.set_num_threads(1)
    if asked.grow:
        with losing(asked.grow[1]):
            print(peak_growth(large(int(asked.grow[0]))) / 2**20)
        return
    print(f"{'':<24}{'ours':>13}  by logits' time over it")
    if asked.default:
        tokens = tokenize(find((), "text"), Config().vocab)
        for name in PRESETS:
            trainer = lambda name=name: Trainer(Config(preset=name, threads=1).settled(), tokens, steps=1000)
            compared(name, {way: trainer().update for way in WAYS}, 3 * asked.rounds)
        return
    for V in WORDS:
        step = large(V)
        made = []
        for way in WAYS:
            with losing(way):
                made.append(step())
        torch.testing.assert_close(*made)
        compared(f"{V} words", dict.fromkeys(WAYS, step), asked.rounds)
        print(*(f"{way}: grows by {growth(V, way):.0f} MiB" for way in WAYS), sep="; ", flush=True)


if __name__ == "__main__":
    main()

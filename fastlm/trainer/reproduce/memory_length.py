"""What a memory of the rows before is worth, by its length in training and in evaluation."""

from dataclasses import replace
from itertools import pairwise
from statistics import mean

import torch

from fastlm.models import Transformer
from fastlm.objectives import Causal
from fastlm.trainer.data.tokenizer import vocabulary
from fastlm.trainer.evaluation import Evaluation
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import clearly_below, draw_lines, of_seeds, shape, spread
from fastlm.trainer.step import Trainer

STEPS, ROW, BATCH = 300, 16, 32
TRAINED = (0, 16, 64)  # tokens of memory
ASKED = (0, 16, 32, 64, 128)
LOOKED_AT = 8192  # tokens of held-out text, the same for each memory
SIDE_BY_SIDE = 8  # stretches of them, each of which begins without a memory


class MemoryLength(Experiment, name="memory-length"):
    of = "Dai et al. 2019: Transformer-XL's loss by the length of its memory, which may be longer in evaluation"
    limits = (
        "Rows are of 16 tokens, so that even a short memory has something to add; two layers of width 64 use little of "
        "what is far away. Updates are equal, and those with a memory take longer. Rows come in random order without a "
        "memory and in the text's order with one, as either has to."
    )

    def run(self, setting: Setting) -> Finding:
        losses: dict[int, list[list[float]]] = {}
        for length in TRAINED:
            sizes = shape(setting, position="transformer-xl", context=ROW, memory=length)
            runs = of_seeds(setting, setting.steps(STEPS), f"memory of {length}", shape=sizes, batch=BATCH)
            losses[length] = [[with_memory(run.trainer, asked) for asked in ASKED] for run in runs]
        columns = ("trained with a memory of", *(f"asked with {asked}" for asked in ASKED))
        rows = [(f"{length}", *map(spread, zip(*found, strict=True))) for length, found in losses.items()]
        draw = lambda figure: _draw(figure, losses)
        return Finding(columns, rows, self._claims(losses), draw, {"losses": losses})

    def _claims(self, losses: dict[int, list[list[float]]]) -> list[Claim]:
        of = lambda trained, asked: [found[ASKED.index(asked)] for found in losses[trained]]
        none, short, long = TRAINED
        own = [mean(of(length, length)) for length in TRAINED]
        asked = [mean(of(long, length)) for length in ASKED if length <= long]
        falls = lambda values: all(after < before for before, after in pairwise(values))
        return [
            Claim("The longer the memory in training and evaluation, the lower the loss, in the mean.", falls(own)),
            Claim(
                f"Every seed with a memory of {long} ends below every seed without one.",
                clearly_below(of(long, long), of(none, none)),
            ),
            Claim(
                f"Of a model trained with {long}, each longer memory up to that lowers the loss, in the mean.",
                falls(asked),
            ),
            Claim(
                f"Trained with {short}, a memory of {long} lowers the loss further than one of {short}, in the mean.",
                mean(of(short, long)) < mean(of(short, short)),
            ),
        ]


def with_memory(trainer: Trainer, length: int) -> float:
    """The held-out loss of a model that remembers so many tokens before each row, nats per token."""
    objective = Causal(trainer.held_out.tokens[: LOOKED_AT + 1], ROW, vocabulary(trainer.tokenizer))
    model = Transformer(replace(trainer.shape, memory=length))
    model.load_state_dict(trainer.model.state_dict())
    return Evaluation(objective, SIDE_BY_SIDE, torch.device("cpu"), remembers=length > 0).of(model)["loss"]


def _draw(figure, losses: dict[int, list[list[float]]]) -> None:
    axes = figure.subplots()
    draw_lines(axes, ASKED, {f"trained with {length}": found for length, found in losses.items()})
    axes.set(xlabel="tokens of memory in evaluation", ylabel="nats per token", xticks=ASKED)
    axes.legend()

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
from fastlm.trainer.reproduce.learning import clearly_below, draw_lines, learned, learner, shape, spread
from fastlm.trainer.step import Trainer, make_objective

STEPS, ROW, BATCH = 600, 16, 16
SHUFFLED = "0, rows in random order"
TRAINED = {SHUFFLED: 0, "0": 0, "16": 16, "64": 64}  # tokens of memory
ASKED = (0, 16, 32, 64, 128)
LOOKED_AT = 8192  # tokens of held-out text, the same for each memory
SIDE_BY_SIDE = 8  # stretches of them, each of which begins without a memory


class MemoryLength(Experiment, name="memory-length"):
    of = "Dai et al. 2019: Transformer-XL's loss by the length of its memory, which may be longer in evaluation"
    limits = (
        "Rows are of 16 tokens, so that even a short memory has something to add; two layers of width 64 use little of "
        "what is far away. Updates are equal, and those with a memory take longer. A memory has to be trained on rows "
        "in the text's order, and so is one model without; what that order costs is seen beside rows in random order."
    )

    def run(self, setting: Setting) -> Finding:
        losses: dict[str, list[list[float]]] = {name: [] for name in TRAINED}
        for name, several in losses.items():
            for seed in setting.seeds:
                trainer = learned(begun(setting, name, seed)).trainer
                several.append([with_memory(trainer, asked) for asked in ASKED])
                setting.say(f"memory of {name}, seed {seed}: {several[-1][ASKED.index(TRAINED[name])]:.3f}")
        columns = ("trained with a memory of", *(f"asked with {asked}" for asked in ASKED))
        rows = [(name, *map(spread, zip(*found, strict=True))) for name, found in losses.items()]
        draw = lambda figure: _draw(figure, losses)
        return Finding(columns, rows, self._claims(losses), draw, {"losses": losses})

    def _claims(self, losses: dict[str, list[list[float]]]) -> list[Claim]:
        of = lambda trained, asked: [found[ASKED.index(asked)] for found in losses[f"{trained}"]]
        none, short, long = [length for name, length in TRAINED.items() if name != SHUFFLED]
        own = [mean(of(length, length)) for length in (none, short, long)]
        asked = [mean(of(long, length)) for length in ASKED if length <= long]
        falls = lambda values: all(after < before for before, after in pairwise(values))
        return [
            Claim(
                "Of rows in order: the longer the memory in training and evaluation, the lower the loss, in the mean.",
                falls(own),
            ),
            *(
                Claim(
                    f"Of rows in order: every seed with a memory of {length} ends below every seed without one.",
                    clearly_below(of(length, length), of(none, none)),
                )
                for length in (short, long)
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


def begun(setting: Setting, name: str, seed: int) -> Trainer:
    """A model before its first update, whose rows go on where others ended, whether it remembers those or not."""
    sizes = shape(setting, position="transformer-xl", context=ROW, memory=TRAINED[name])
    trainer = learner(setting, setting.steps(STEPS), seed, shape=sizes, batch=BATCH)
    if name != SHUFFLED and not trainer.remembers:
        known, ids = vocabulary(trainer.tokenizer), setting.tokens.train
        trainer.train = make_objective(trainer.config, "train", ids, ROW, known, streams=BATCH)
        trainer.stages = [trainer.train]
    return trainer


def with_memory(trainer: Trainer, length: int) -> float:
    """The held-out loss of a model that remembers so many tokens before each row, nats per token."""
    objective = Causal(trainer.held_out.tokens[: LOOKED_AT + 1], ROW, vocabulary(trainer.tokenizer))
    model = Transformer(replace(trainer.shape, memory=length))
    model.load_state_dict(trainer.model.state_dict())
    return Evaluation(objective, SIDE_BY_SIDE, torch.device("cpu"), remembers=length > 0).of(model)["loss"]


def _draw(figure, losses: dict[str, list[list[float]]]) -> None:
    axes = figure.subplots()
    draw_lines(axes, ASKED, {f"trained with {name}": found for name, found in losses.items()})
    axes.set(xlabel="tokens of memory in evaluation", ylabel="nats per token", xticks=ASKED)
    axes.legend()

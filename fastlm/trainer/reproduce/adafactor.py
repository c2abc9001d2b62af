"""Adafactor's memory and its loss, beside Adam's."""

import torch

from fastlm.models import Transformer
from fastlm.models.presets import PRESETS
from fastlm.optim import memory_table
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import draw_curves, losses_of, of_seeds, spread

STEPS = 200
SIZES = ("gpt2", "t5-base", "bert-large")
RATES = {"adamw": 3e-3, "adafactor": 6e-2}


class AdafactorsMemory(Experiment, name="adafactor"):
    of = "Shazeer & Stern 2018: states of rows and columns, O(n + m) for a matrix of n · m, without momentum"
    limits = (
        "States are counted exactly, at the papers' sizes. Losses are of one small model at one rate each, which says "
        "nothing of large ones, where Adafactor was found hard to train without its other parts."
    )

    def run(self, setting: Setting) -> Finding:
        states = {name: _states(name) for name in SIZES}
        runs = {
            name: of_seeds(setting, setting.steps(STEPS), name, optimizer=name, lr=lr) for name, lr in RATES.items()
        }
        found = {name: losses_of(several) for name, several in runs.items()}
        rows = [
            (name, *(f"{states[size][name]:.4f}" for size in SIZES), spread(values)) for name, values in found.items()
        ]
        behind = max(found["adafactor"]) - min(found["adamw"])
        claims = [
            Claim("Adam keeps two numbers a parameter.", all(abs(x["adamw"] - 2) < 1e-3 for x in states.values())),
            Claim("Adafactor keeps less than a hundredth of one.", all(x["adafactor"] < 0.01 for x in states.values())),
            Claim(f"Its loss is within 0.1 nats of Adam's here ({behind:+.3f} at the worst).", behind < 0.1),
        ]
        columns = ("optimizer", *(f"states a parameter, {name}" for name in SIZES), "held-out loss, nats per token")
        draw = lambda figure: draw_curves(figure.subplots(), runs)
        return Finding(columns, rows, claims, draw, {"states": states, "losses": found})


def _states(preset: str) -> dict[str, float]:
    """Numbers of fp32 that an optimizer keeps for each parameter."""
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    table = memory_table(model, tuple(RATES))
    return {row.optimizer: row.states / row.parameters for row in table if row.master is None}

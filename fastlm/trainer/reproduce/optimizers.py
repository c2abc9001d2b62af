"""SGD beside the optimizers that adapt to each parameter."""

from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import (
    clearly_below,
    draw_curves,
    learned,
    learner,
    losses_of,
    of_seeds,
    spread,
)

STEPS = 150
# rates tried with the first seed, each three times its neighbour
RATES = {
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "adam": (1e-3, 3e-3, 9e-3),
    "adamw": (1e-3, 3e-3, 9e-3),
    "lamb": (1e-2, 3e-2, 9e-2),
    "adafactor": (2e-2, 6e-2, 18e-2),
}


class Optimizers(Experiment, name="optimizers"):
    of = "the lectures' rule that SGD does not train Transformers, and Adam, AdamW, LAMB and Adafactor do"
    limits = (
        "The rate of each is the best of a few, by the first seed; momentum, betas and decay are the trainer's. SGD "
        "with more tuning and more updates may come nearer. What is shown is the order after so many updates."
    )

    def run(self, setting: Setting) -> Finding:
        steps = setting.steps(STEPS)
        rates = {name: self._best(setting, steps, name) for name in RATES}
        runs = {name: of_seeds(setting, steps, name, optimizer=name, lr=lr) for name, lr in rates.items()}
        found = {name: losses_of(several) for name, several in runs.items()}
        rows = [(name, f"{rates[name]:g}", spread(values)) for name, values in found.items()]
        claims = [
            Claim(f"Every seed of {name} ends below every seed of SGD.", clearly_below(found[name], found["sgd"]))
            for name in RATES
            if name != "sgd"
        ]
        columns = ("optimizer", "peak rate", "held-out loss, nats per token")
        draw = lambda figure: draw_curves(figure.subplots(), runs)
        return Finding(columns, rows, claims, draw, {"losses": found, "rates": rates})

    def _best(self, setting: Setting, steps: int, name: str) -> float:
        def loss(lr: float) -> float:
            found = learned(learner(setting, steps, setting.seeds[0], optimizer=name, lr=lr)).held_out
            setting.say(f"{name} at {lr:g}: {found:.3f}")
            return found

        return min(RATES[name], key=loss)

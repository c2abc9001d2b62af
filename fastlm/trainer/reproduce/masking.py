"""Tokens hidden once for all, or anew at each visit."""

from dataclasses import replace

from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import SMALL, draw_curves, losses_of, of_seeds, shape, spread

STEPS, EPOCHS = 300, 20
WAYS = {"static": ("rounds=1",), "ten copies": ("rounds=10",), "dynamic": ()}


class StaticAndDynamic(Experiment, name="masking"):
    of = "Liu et al. 2019, table 1: static masking, BERT's ten copies of the data, and dynamic masking"
    limits = (
        "The text is small and seen twenty times; RoBERTa's gain was small, and after few epochs there is none to see. "
        "Two layers may not be enough to learn masks by heart. No downstream task is looked at."
    )

    def run(self, setting: Setting) -> Finding:
        steps = setting.steps(STEPS)
        few = few_rows(setting, round(SMALL["batch"] * steps / EPOCHS) + 1, SMALL["context"])
        # norms come first here, with which it learns soon
        options = dict(preset="roberta", shape=shape(setting, kind="encoder"))
        runs = {
            name: of_seeds(few, steps, name, objective_options=("rate=0.3", *way), **options)
            for name, way in WAYS.items()
        }
        found = {name: losses_of(several) for name, several in runs.items()}
        last = {name: [run.smoothed()[-1] for run in several] for name, several in runs.items()}
        rows = [(name, spread(last[name]), spread(found[name])) for name in WAYS]
        static, dynamic = (sum(found[name]) / len(found[name]) for name in ("static", "dynamic"))
        learned_static, learned_dynamic = (sum(last[name]) / len(last[name]) for name in ("static", "dynamic"))
        claims = [
            Claim(
                "Masks that stay are learned by heart: their training loss is lower.", learned_static < learned_dynamic
            ),
            Claim("Held-out loss is lower with masks drawn anew, in the mean of the seeds.", dynamic < static),
        ]
        columns = ("masking", "training loss at the end", "held-out loss, nats per hidden token")
        return Finding(columns, rows, claims, lambda figure: draw_curves(figure.subplots(), runs), {"losses": found})


def few_rows(setting: Setting, rows: int, context: int) -> Setting:
    """The same with so many rows to learn from."""
    return setting._replace(tokens=replace(setting.tokens, train=setting.tokens.train[: (rows + 1) * context]))

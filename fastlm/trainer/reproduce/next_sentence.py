"""Pairs of texts with and without the label that says whether the second follows the first."""

from fastlm.objectives import Masked
from fastlm.trainer.data.tokenizer import vocabulary
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import (
    Learned,
    draw_dots,
    held_out,
    learned,
    learner,
    lower_in_mean,
    shape,
    spread,
)
from fastlm.trainer.step import Trainer

STEPS, ROW, BATCH = 400, 64, 8
RATE = 0.3  # of tokens hidden
LABEL, PAIRS, FULL = "pairs and the label", "pairs alone", "rows of full text"


class WithoutNextSentence(Experiment, name="next-sentence"):
    of = "Liu et al. 2019, table 2: BERT's pairs and next sentences, and rows of full text without them"
    limits = (
        "What is compared is the loss of hidden tokens, where RoBERTa's table has tasks. Rows of full text are new to "
        "who learned from pairs, which part of that difference may be; the same rows with and without the label are "
        "the plainer comparison. Rows hold a few lines of Python, and where the label is right about as often as not, "
        "it was not learned, and what it costs later is not seen."
    )

    def run(self, setting: Setting) -> Finding:
        runs: dict[str, list[Learned]] = {name: [] for name in (LABEL, PAIRS, FULL)}
        for name, several in runs.items():
            for seed in setting.seeds:
                several.append(learned(begun(setting, name, seed)))
                setting.say(f"{name}, seed {seed}: {several[-1].held_out:.3f}")
        of_pairs = {name: [run.held_out for run in runs[name]] for name in (LABEL, PAIRS)}
        of_rows = {name: [of_full_rows(run.trainer) for run in several] for name, several in runs.items()}
        right = [100 * run.trainer.evaluate()["nsp_accuracy"] for run in runs[LABEL]]
        rows = [
            (
                name,
                spread(of_pairs[name]) if name in of_pairs else "-",
                spread(of_rows[name]),
                f"{spread(right, 1)} %" if name == LABEL else "-",
            )
            for name in runs
        ]
        claims = [
            Claim(
                "Of the same pairs, hidden tokens cost no more where the label is not learned, in the mean.",
                lower_in_mean(of_pairs[PAIRS], of_pairs[LABEL]),
            ),
            Claim(
                "Hidden tokens of full text cost no more after such rows than after pairs and the label, in the mean.",
                lower_in_mean(of_rows[FULL], of_rows[LABEL]),
            ),
        ]
        columns = ("learned from", "held-out pairs, nats per hidden token", "held-out full text", "label right")
        draw = lambda figure: _draw(figure, of_pairs, of_rows)
        values = {"pairs": of_pairs, "rows": of_rows, "right": right}
        return Finding(columns, rows, claims, draw, values)


def begun(setting: Setting, name: str, seed: int) -> Trainer:
    """A model before its first update, and what it is to learn."""
    options = dict(preset="bert", batch=BATCH, objective_options=(f"rate={RATE}",))
    objective = "mlm" if name == FULL else "nsp"
    sizes = shape(setting, kind="encoder", context=ROW)
    trainer = learner(setting, setting.steps(STEPS), seed, objective=objective, shape=sizes, **options)
    if name == PAIRS:
        trainer.train.weights = {"nsp": 0.0}
    return trainer


def of_full_rows(trainer: Trainer) -> float:
    """The held-out loss of tokens hidden in rows of full text, nats per token."""
    return held_out(trainer, Masked(trainer.held_out.tokens, ROW, vocabulary(trainer.tokenizer), rate=RATE))


def _draw(figure, of_pairs: dict[str, list[float]], of_rows: dict[str, list[float]]) -> None:
    left, right = figure.subplots(1, 2)
    draw_dots(left, of_pairs, "held-out pairs, nats per hidden token")
    draw_dots(right, of_rows, "held-out full text, nats per hidden token")

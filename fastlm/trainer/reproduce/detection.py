"""Learning which tokens were replaced, beside learning those that were hidden, for as much work."""

from collections.abc import Sequence
from dataclasses import asdict

from fastlm.models import Electra, Transformer
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.tokenizer import load_tokenizer, vocabulary
from fastlm.trainer.options.finetune import FineTune
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import draw_dots, learned, learner, looked_at, lower_in_mean, shape, spread
from fastlm.trainer.step import Trainer
from fastlm.trainer.tasks import library
from fastlm.trainer.tasks.examples import Examples, Facts, encoded, encoding_of, sides_of
from fastlm.trainer.tasks.rows import Row, labels_of

STEPS, ROW, BATCH = 400, 64, 8  # updates of who learns hidden tokens; the others' are as much work
TUNED, LR = 120, 1e-3  # updates of 16 labelled rows, and their peak rate
RATE = 0.25  # of tokens that are hidden or replaced
HIDDEN, LEARNED, UNIFORM, ANEW = "hidden tokens", "replaced, by a generator", "replaced, evenly", "drawn anew"
WAYS = {
    HIDDEN: dict(preset="roberta"),
    LEARNED: dict(preset="electra"),
    UNIFORM: dict(preset="electra", objective_options=("uniform=true",)),
}


class Detection(Experiment, name="detection"):
    of = "Clark et al. 2020, fig. 1: replaced tokens and hidden ones at equal work; besides, tokens replaced evenly"
    limits = (
        "Work is counted as multiplications by weights, without attention's own. One task is looked at, what lines of "
        "Python are, with some two hundred rows held out, of which one is half a per cent. A detector has to wait for "
        "its generator, and may have learned little in so few updates: how many of the replaced tokens it finds says "
        "how far it came."
    )

    def run(self, setting: Setting) -> Finding:
        _, rows = library.rows()
        work = {name: products(begun(setting, name, 2, setting.seeds[0])) for name in WAYS}
        updates = {name: max(2, round(setting.steps(STEPS) * work[HIDDEN] / of)) for name, of in work.items()}
        right: dict[str, list[float]] = {name: [] for name in (*WAYS, ANEW)}
        seen: dict[str, list[float]] = {LEARNED: [], UNIFORM: []}
        for seed in setting.seeds:
            for name, found in right.items():
                trainer = begun(setting, HIDDEN if name == ANEW else name, updates.get(name, 2), seed)
                if name in WAYS:
                    learned(trainer)
                if name in seen:
                    seen[name].append(100 * looked_at(trainer, trainer.held_out)["recall"])
                found.append(100 * accuracy(setting, trainer.exported(trainer.model), rows, seed))
                setting.say(f"{name}, seed {seed}: {found[-1]:.1f} % right")
        cells = [
            (
                name,
                f"{updates[name]:,}" if name in updates else "-",
                f"{spread(seen[name], 1)} %" if name in seen else "-",
                f"{spread(found, 1)} %",
            )
            for name, found in right.items()
        ]
        columns = ("learned from", "updates", "replaced tokens found", "right of held-out rows, fine-tuned")
        draw = lambda figure: draw_dots(figure.subplots(), right, "% of held-out rows right, fine-tuned")
        values = {"right": right, "updates": updates, "work": work, "seen": seen}
        return Finding(columns, cells, _claims(right), draw, values)


def begun(setting: Setting, name: str, steps: int, seed: int) -> Trainer:
    """A model before the first of so many updates, and what it is to learn."""
    options = dict(WAYS[name])
    options["objective_options"] = (f"rate={RATE}", *options.get("objective_options", ()))
    # a narrow generator's head needs a layer between its states and its tokens
    sizes = shape(setting, kind="encoder", context=ROW, head_transform=True)
    return learner(setting, steps, seed, shape=sizes, batch=BATCH, **options)


def products(trainer: Trainer) -> float:
    """Multiplications by weights for a token of the text, forward: each layer's, and the head's where it reads."""
    model = trainer.model
    return sum(map(_products, (model.generator, model.discriminator) if isinstance(model, Electra) else (model,)))


def _products(model: Transformer) -> float:
    encoder, head = (sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (model.encoder, model.head))
    return encoder + head * (RATE if model.config.head == "lm" else 1)


def accuracy(setting: Setting, trained: Transformer, rows: list[Row], seed: int) -> float:
    """The share of held-out rows that a model is right about after it was fine-tuned on the others."""
    train, held_out = sides_of(rows, seed)
    tokens, steps = setting.tokens, setting.steps(TUNED)
    config = FineTune(
        tokens.folder, kind="classification", labels=labels_of(train), shape=asdict(trained.config), steps=steps,
        seed=seed, threads=1, lr=LR,
    ).settled()  # fmt: skip
    tokenizer, skipped = load_tokenizer(tokens.tokenizer_file), Skipped()
    known = vocabulary(tokenizer)
    sides = [encoded(side, config, known, encoding_of(tokenizer), skipped.add) for side in (train, held_out)]
    examples = Examples(
        "", config.task_class(), config.head(), *sides, "", library.SPLIT, skipped, tokens.tokenizer_file,
        Facts(known.size),
    )  # fmt: skip
    trainer = Trainer(config, examples, steps)
    trainer.train.begin_with(trainer.model, trained)
    learned(trainer)
    return trainer.evaluate()["accuracy"]


def _claims(right: dict[str, Sequence[float]]) -> list[Claim]:
    least = lambda name, other: lower_in_mean(right[other], right[name])
    return [
        Claim(
            "Replaced tokens of a generator are worth no less than hidden ones, in the mean.", least(LEARNED, HIDDEN)
        ),
        Claim("Hidden tokens are worth no less than tokens replaced evenly, in the mean.", least(HIDDEN, UNIFORM)),
        Claim(
            "Replaced tokens of a generator are worth no less than tokens replaced evenly, in the mean.",
            least(LEARNED, UNIFORM),
        ),
        Claim("Each is worth more than weights drawn anew, in the mean.", not any(least(ANEW, name) for name in WAYS)),
    ]

"""How a text is spoilt that a model learns to write as it was, and what that is worth to another task."""

from itertools import product
from statistics import mean

from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import (
    draw_dots,
    learned,
    learner,
    losses_of,
    lower_in_mean,
    of_seeds,
    shape,
    spread,
)

STEPS, ROW, BATCH = 200, 64, 8
TUNED, RATE = 50, 2e-3  # updates and peak rate of what comes after
NOISES = {
    "token masking": ("spoil=mask", "permute=false"),
    "token deletion": ("spoil=delete", "permute=false"),
    "text infilling": ("spoil=infill", "permute=false"),
    "sentence permutation": ("spoil=none", "permute=true"),
    "document rotation": ("spoil=none", "permute=false", "rotate=1"),
    "infilling and permutation": ("spoil=infill", "permute=true"),
}
ANEW = "none, drawn anew"
TOKENS, ORDERS = tuple(NOISES)[:3], tuple(NOISES)[3:5]


class BartNoises(Experiment, name="bart-noises"):
    of = "Lewis et al. 2020, table 1: BART's noises, each by itself, and infilling with permuted sentences"
    limits = (
        "What each noise is worth is told by one task, half of a row that is written from the other half, after a few "
        "updates of it; the paper has six, questions and summaries among them. Own losses are of different tasks, and "
        "not to be compared. After so few updates decoders predict from what they wrote rather than copy what they "
        "read, which differs little between noises; and rows hold a few lines, of which there is little to permute."
    )

    def run(self, setting: Setting) -> Finding:
        steps, options = setting.steps(STEPS), dict(preset="bart", batch=BATCH)
        options["shape"] = shape(setting, kind="encoder-decoder", context=ROW)
        runs = {
            name: of_seeds(setting, steps, name, objective_options=noise, **options)
            for name, noise in NOISES.items()
        }  # fmt: skip
        tuned: dict[str, list[float]] = {ANEW: []} | {name: [] for name in NOISES}
        for (i, seed), (name, losses) in product(enumerate(setting.seeds), tuned.items()):
            after = learner(setting, setting.steps(TUNED), seed, objective="mass", **options | {"lr": RATE})
            if name != ANEW:
                after.model.load_state_dict(runs[name][i].trainer.model.state_dict())
            losses.append(learned(after).held_out)
            setting.say(f"{name}, seed {seed}, tuned: {losses[-1]:.3f}")
        own = {name: spread(losses_of(several)) for name, several in runs.items()}
        rows = [(name, own.get(name, "-"), spread(losses)) for name, losses in tuned.items()]
        columns = ("noise", "its own held-out loss", "half of a row from the other, held-out loss")
        draw = lambda figure: draw_dots(figure.subplots(), tuned, "half of a row from the other, nats per token")
        return Finding(columns, rows, _claims(tuned), draw, {"tuned": tuned})


def _claims(tuned: dict[str, list[float]]) -> list[Claim]:
    below = lambda name, other: all(a < b for a, b in zip(tuned[name], tuned[other], strict=True))
    return [
        Claim(
            "With whatever noise, every seed ends below the same one drawn anew.", all(below(n, ANEW) for n in NOISES)
        ),
        Claim(
            "Permuting sentences or rotating alone is worth less than masking, deleting or infilling, in the mean.",
            all(mean(tuned[token]) < mean(tuned[order]) for token, order in product(TOKENS, ORDERS)),
        ),
        Claim(
            "Deletion is worth no less than masking, in the mean.",
            lower_in_mean(tuned["token deletion"], tuned["token masking"]),
        ),
        Claim(
            "No single noise is worth more than infilling, in the mean.",
            all(lower_in_mean(tuned["text infilling"], tuned[name]) for name in (*TOKENS, *ORDERS)),
        ),
    ]

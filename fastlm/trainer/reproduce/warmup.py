"""How long the learning rate climbs, where norms come after the sum of a branch and the stream."""

from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import clearly_below, draw_curves, losses_of, of_seeds, shape, spread

STEPS = 200
SHARES = (0.0, 0.02, 0.1, 0.4)
OPTIONS = dict(batch=8, schedule="constant", lr=3e-3, clip=0.0, betas=(0.9, 0.98))


class Warmup(Experiment, name="warmup"):
    of = "Popel & Bojar 2018, fig. 8: below some warmup training fails; Huang et al. 2020: where norms come last"
    limits = (
        "Two layers of width 64 over a few hundred updates say that a climb helps at a high rate; not how long one has "
        "to be at another size, nor what a lower rate or another positional scheme would do without it."
    )

    def run(self, setting: Setting) -> Finding:
        steps, post = setting.steps(STEPS), shape(setting, norm_place="post", position="learned")
        runs = {
            f"{share:.0%}": of_seeds(
                setting, steps, f"warmup over {share:.0%}", shape=post, warmup=share, **OPTIONS
            )
            for share in SHARES
        }  # fmt: skip
        found = {name: losses_of(several) for name, several in runs.items()}
        rows = [(name, spread(values)) for name, values in found.items()]
        without, long = found["0%"], found["40%"]
        claims = [
            Claim(
                "Without a climb every seed ends with a higher held-out loss than any with the longest.",
                clearly_below(long, without),
            )
        ]
        columns = ("warmup, of the updates", "held-out loss, nats per token")
        return Finding(columns, rows, claims, lambda figure: draw_curves(figure.subplots(), runs), {"losses": found})

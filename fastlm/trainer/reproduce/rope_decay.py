"""How far rotary scores may reach."""

import torch

from fastlm.positions.frequencies import geometric
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting

CHANNELS, BASE, FARTHEST = 128, 10000.0, 1024


class RotaryDecay(Experiment, name="rope-decay"):
    of = "Su et al. 2021, sec. 3.4.3 and fig. 2: the bound on a rotary score falls with distance; computed, no seeds"
    limits = (
        "This bounds scores whose queries and keys change little between neighbouring channels. It is no law: a model "
        "may learn queries and keys that see far, and the curve rises again where frequencies come into phase."
    )

    def run(self, setting: Setting) -> Finding:
        bound = decay(torch.arange(FARTHEST + 1), CHANNELS, BASE)
        whole = bound[0].item()
        means = [bound[2**k : 2 ** (k + 1)].mean().item() for k in range(10)]
        rows = [(f"{2**k} to {2 ** (k + 1) - 1}", f"{x:.2f}", f"{x / whole:.0%}") for k, x in enumerate(means)]
        rises = int((bound.diff() > 0).sum())
        claims = [
            Claim("Over distances that double, the mean of the bound falls each time.", means == sorted(means)[::-1]),
            Claim(
                f"It falls at every step of distance (it rises at {rises} of {FARTHEST:,}).",
                rises == 0,
            ),
        ]
        columns = ("distance", "mean of the bound", "of that at distance 0")
        return Finding(columns, rows, claims, lambda figure: _draw(figure, bound), {"bound": bound})


def decay(distance: torch.Tensor, channels: int, base: float) -> torch.Tensor:
    """The mean over i of |Σ_{j ≤ i} e^{i · distance · θ_j}|: distance [n] → [n] fp64."""
    angles = distance.double()[:, None] * geometric(base, channels)
    return torch.polar(torch.ones_like(angles), angles).cumsum(-1).abs().mean(-1)


def _draw(figure, bound: torch.Tensor) -> None:
    axes = figure.subplots()
    axes.plot(bound.tolist())
    axes.set(
        xlabel="distance", ylabel="bound on the score", title=f"{CHANNELS} channels, base {BASE:g}", ylim=(0, None)
    )

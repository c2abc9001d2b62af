"""What experiments found, written down: a figure each, and one report.md of all that ran."""

import platform
from pathlib import Path

import torch

from fastlm import __version__
from fastlm.backends.info import device_name
from fastlm.trainer.disk import write_file
from fastlm.trainer.reproduce.experiment import Experiment, Finding, Setting

HOLDS = {True: "holds", False: "does not hold here"}


def draw(experiment: Experiment, finding: Finding, folder: Path) -> Path:
    """NAME.png, whole or not there."""
    from matplotlib.figure import Figure  # without pyplot, nothing looks for a display

    figure = Figure(figsize=(9, 5), layout="constrained")
    finding.draw(figure)
    path, made = folder / f"{experiment.name}.png", folder / f".tmp-{experiment.name}.png"
    figure.savefig(made, dpi=120)
    made.replace(path)
    return path


def write(found: dict[Experiment, Finding], setting: Setting, folder: Path) -> Path:
    """report.md, with what everything was found by."""
    machine = f"fastlm {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    seeds = ", ".join(map(str, setting.seeds))
    spent = f"Seeds {seeds}; ± is one standard deviation between them. Effort {setting.effort:g}."
    text = f"# Reproduced at a small size\n\n{machine}, {device_name(torch.device('cpu'))}. {spent}\n"
    path = folder / "report.md"
    write_file(path, text + "".join(_section(*each) for each in found.items()))
    return path


def _section(experiment: Experiment, finding: Finding) -> str:
    lines = [" | ".join(cells) for cells in (finding.columns, ["---"] * len(finding.columns), *finding.rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    claims = "\n".join(f"* {claim.words} **{HOLDS[claim.holds].capitalize()}.**" for claim in finding.claims)
    shown = f"![{experiment.name}]({experiment.name}.png)"
    return f"\n## {experiment.name}\n\nOf {experiment.of}.\n\n{table}\n\n{claims}\n\n{experiment.limits}\n\n{shown}\n"

"""fastlm's optimizers inside other people's trainers, schedules, hooks and torch.compile: the same losses as the optimizers they replace."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from formulas import KINDS
from torch import nn

import fastlm
from fastlm import optim

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"huggingface_trainer": ("transformers", "accelerate"), "lightning_module": ("lightning",), "plain_amp_loop": ("transformers",)}


def example(name: str) -> dict:
    """What an example's file defines."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def replaced(optimizer: str):
    if optimizer == "adamw":
        return lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)
    import transformers

    return lambda params: transformers.optimization.Adafactor(params, lr=3e-3, scale_parameter=False, relative_step=False)


@pytest.mark.filterwarnings("ignore")  # of the trainers
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize("name", NEEDS)
def test_loss_curves_equal_those_of_the_optimizer_replaced(name, optimizer):
    here = example(name)
    ours = here["train"](here["OPTIMIZERS"][optimizer])
    more = dict(Scaler=torch.amp.GradScaler) if name == "plain_amp_loop" else {}
    theirs = here["train"](replaced(optimizer), clip=here["CLIP"], **more)
    assert len(ours) == 20 and ours[-1] < 0.8 * ours[0]
    rtol = 1e-4 if name == "plain_amp_loop" else 1e-5  # weights that differ in the last bit of fp32 may be rounded to different fp16
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rtol, atol=0)


def test_an_example_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_amp_loop.py", "adamw"])
    runpy.run_path(str(EXAMPLES / "plain_amp_loop.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("loss 3.")


def test_examples_are_short_and_tested():
    files = {path.stem: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert set(files) == set(NEEDS) and max(files.values()) < 60

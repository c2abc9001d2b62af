"""Examples: those that tests/optim/test_trainers.py does not run, in fewer steps; and that none is left out."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from fastlm.positions import SCHEMES

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the trainer, about itself
@pytest.mark.parametrize("name", ["t5", "bert"])
def test_swapped_models_have_the_losses_of_their_own(name):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason="pip install '.[test]'")
    train = runpy.run_path(str(EXAMPLES / "swapped_models.py"))["train"]
    ours, theirs = train(name, steps=20), train(name, swapped=False, steps=20)
    assert ours[-1] < ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name, package", [("accelerate_loop", "accelerate"), ("lightning_swapped", "lightning")])
def test_swapped_models_in_loops_and_trainers_of_others(name, package):
    for needed in ("transformers", package):
        pytest.importorskip(needed, reason="pip install '.[test]'")
    train = runpy.run_path(str(EXAMPLES / f"{name}.py"))["train"]
    ours, theirs = train(steps=20), train(swapped=False, steps=20)
    assert len(ours) == 20 and ours[-1] < 0.9 * ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=0)


def test_positions_that_are_interpolated_reach_further():
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    here = runpy.run_path(str(EXAMPLES / "longer_context.py"))
    model = here["train"](100)
    longer, L = here["interpolated"](model), here["FACTOR"] * here["TRAINED"]
    assert here["perplexity"](model, here["TRAINED"]) < 1.5 and here["perplexity"](longer, L) < 1.5
    assert here["perplexity"](model, L) > 5


def test_a_scheme_of_ones_own_learns():
    try:
        here = runpy.run_path(str(EXAMPLES / "own_scheme.py"))
        before, after = (here["train"]("logarithmic", steps=steps) for steps in (1, 30))
    finally:
        SCHEMES.pop("logarithmic", None)
    assert all(after[L] < 0.9 * before[L] for L in here["LENGTHS"])


def test_the_notebook_says_what_its_cells_print(capsys, monkeypatch):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package, reason="pip install '.[test]'")
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [c for c in json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    here = {"__name__": "tour"}
    try:
        for cell in cells:
            exec("".join(line for line in cell["source"] if not line.startswith("%")), here)
            said = ["".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream"]
            assert capsys.readouterr().out == "".join(said)
        ripple, alibi = (here["losses"](name)[-1] for name in ("ripple", "alibi"))
        assert ripple < alibi - 0.5
    finally:
        SCHEMES.pop("ripple", None)
        here["plt"].close("all")


def test_every_example_is_short_and_tested():
    tests = Path(__file__).read_text() + (ROOT / "tests/optim/test_trainers.py").read_text()
    for example in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        assert example.stem in tests, example
    for example in EXAMPLES.glob("*.py"):
        assert example.read_text().count("\n") < 100, example

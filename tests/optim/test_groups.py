"""Groups of parameters, and the table of what optimizers take of memory."""

import pytest
import torch
from steps import BF16
from torch import nn

from fastlm import optim
from fastlm.optim.states import MASTERS


def test_decay_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 3))
    model[0].weight.requires_grad_(False)
    decayed, free = optim.decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(5, 3)] and decayed["weight_decay"] == 0.1
    assert len(free["params"]) == 3 and free["weight_decay"] == 0.0


def test_berts_recipe_decays_all_but_norms_and_biases():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 3))
    model.slope = nn.Parameter(torch.zeros(2))
    decayed, free = optim.decay_groups(model, 0.1, "bert")
    assert {p.shape for p in decayed["params"]} == {(4, 3), (5, 3), (2,)} and {p.shape for p in free["params"]} == {
        (4,)
    }
    with pytest.raises(ValueError, match="choose from 'gpt', 'bert'"):
        optim.decay_groups(model, 0.1, "t5")


def test_lower_layers_learn_more_slowly():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 3),
            "layers": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]),
            "head": nn.Linear(3, 5),
        }
    )
    lrs = {p: group["lr"] for group in optim.layer_groups(model, 1.0, 0.5, 0.1) for p in group["params"]}
    assert [
        lrs[m]
        for m in (model["embed"].weight, model["layers"][0].weight, model["layers"][1].bias, model["head"].weight)
    ] == [0.125, 0.25, 0.5, 1.0]


def test_memory_table_says_what_a_step_makes():
    """The table's bytes are those of the state after a step; for a matrix Adafactor keeps n + m numbers."""
    model = nn.Sequential(nn.Linear(256, 192), nn.Linear(192, 130)).to(BF16)
    table = optim.memory_table(model)
    assert {(r.optimizer, r.master) for r in table} == {
        (name, master) for name in optim.OPTIMIZERS for master in MASTERS
    }
    size = lambda state, names: sum(
        t.numel() * t.element_size() for values in state.values() for name, t in values.items() if names(name)
    )
    for row in table:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = optim.OPTIMIZERS[row.optimizer](model.parameters(), master=row.master)
        optimizer.step()
        assert row.states == size(optimizer.state, lambda name: name not in ("master", "remainder"))
        assert row.masters == size(optimizer.state, lambda name: name in ("master", "remainder"))
    adafactor = next(r for r in table if r.optimizer == "adafactor")
    assert adafactor.states == 4 * (256 + 192 + 192 + 192 + 130 + 130 + 4)  # factors, biases in full, four steps
    n = sum(p.numel() for p in model.parameters())
    adamw = next(r for r in table if (r.optimizer, r.master) == ("adamw", "fp32"))
    assert (adamw.parameters, adamw.gradients, adamw.masters, adamw.states) == (2 * n, 2 * n, 4 * n, 8 * n + 16)
    assert str(table).count("\n") == len(table) and not any(r.chosen for r in table)


def test_the_memory_table_marks_the_chosen_optimizer():
    """With its own options, and whatever a trainer made of its class."""
    model = nn.Linear(8, 4).to(BF16)

    class Wrapped(optim.SGD):
        pass

    chosen = Wrapped(model.parameters(), momentum=0.9, master="fp32")
    rows = [r for r in optim.memory_table(model, chosen=chosen) if r.chosen]
    assert [(r.optimizer, r.master, r.masters, r.states) for r in rows] == [("sgd", "fp32", 4 * 36, 4 * 36 + 8)]
    assert (
        next(
            line
            for line in str(optim.memory_table(model, chosen=optim.AdamW(model.parameters()))).splitlines()
            if "chosen" in line
        ).split()[0]
        == "adamw"
    )

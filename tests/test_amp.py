"""GradScaler: torch's sequence of scales, one pass with fastlm's optimizers, torch's scaler with ours and ours with torch's."""

import copy

import pytest
import torch
from torch import nn

from fastlm.amp import GradScaler
from fastlm.optim import AdamW

SCALERS = {"fastlm": GradScaler, "torch": torch.amp.GradScaler}


def train(scaler, optimizer, model, clip=None, steps=12, overflow_at=5):
    """Twelve steps with an overflow at the fifth; returns the scale after each."""
    g = torch.Generator().manual_seed(3)
    scales = []
    for step in range(1, steps + 1):
        x = torch.randn(4, 6, generator=g)
        if step == overflow_at:
            x[0, 0] = torch.inf
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize("kind", SCALERS)
def test_published_sequence(kind):
    net = model()
    scaler = SCALERS[kind]("cpu", init_scale=8.0, growth_interval=3)
    assert train(scaler, AdamW(net.parameters(), 1e-2), net) == [8, 8, 16, 16, 8, 8, 8, 16, 16, 16, 32, 32]


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("manual", [False, True], ids=["in_the_step", "unscale_and_clip_by_hand"])
@pytest.mark.parametrize("kind", SCALERS)
def test_equals_torchs_chain(kind, manual, clip):
    ours, theirs = model(), model()
    a = AdamW(ours.parameters(), 1e-2, max_grad_norm=None if manual else clip)
    b = torch.optim.AdamW(theirs.parameters(), 1e-2)
    options = dict(init_scale=8.0, growth_interval=3)
    scales = train(SCALERS[kind]("cpu", **options), a, ours, clip if manual else None)
    assert scales == train(torch.amp.GradScaler("cpu", **options), b, theirs, clip)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert a.state[p]["step"] == b.state[q]["step"] == 11


def test_steps_any_other_optimizer_as_torch_does():
    ours, theirs = model(), model()
    scales = train(GradScaler("cpu", init_scale=8.0, growth_interval=3), torch.optim.SGD(ours.parameters(), 0.01), ours)
    assert scales == train(torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3), torch.optim.SGD(theirs.parameters(), 0.01), theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_fp16_gradients_are_allowed():
    net = nn.Linear(3, 1).half()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(net(torch.ones(1, 3).half()).sum()).backward()
    scaler.unscale_(optimizer)
    assert net.weight.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_state_dict_is_torchs():
    scaler = GradScaler("cpu", init_scale=32.0)
    net = model()
    train(scaler, AdamW(net.parameters()), net, steps=3)
    theirs = torch.amp.GradScaler("cpu")
    theirs.load_state_dict(scaler.state_dict())
    assert theirs.get_scale() == scaler.get_scale() and theirs.state_dict() == scaler.state_dict()


def test_misuse_is_refused():
    net = model()
    optimizer, scaler = AdamW(net.parameters()), GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 6)).sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="since the last update"):
        scaler.step(optimizer)


def test_disabled_scaler_steps():
    net = model()
    before = copy.deepcopy(net.state_dict())
    scaler = GradScaler("cpu", enabled=False)
    train(scaler, AdamW(net.parameters()), net, steps=2)
    assert not torch.equal(before["0.weight"], net[0].weight)

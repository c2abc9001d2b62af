"""GradScaler: torch's sequence of scales, one pass with fastlm's optimizers, torch's scaler with ours and ours with
torch's.
"""

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


@pytest.mark.parametrize("make", [AdamW, torch.optim.AdamW], ids=["ours", "torchs"])
def test_whether_a_step_was_skipped_is_known_until_the_update(make):
    net, found = model(), []
    scaler, optimizer = GradScaler("cpu", init_scale=8.0), make(net.parameters(), 1e-2)
    update = scaler.update
    scaler.update = lambda: (found.append(scaler.skipped(optimizer).item()), update())
    train(scaler, optimizer, net, steps=4, overflow_at=2)
    assert found == [0, 1, 0, 0] and scaler.skipped(optimizer) is None
    assert GradScaler("cpu", enabled=False).skipped(optimizer) is None


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("manual", [False, True], ids=["in_the_step", "unscale_and_clip_by_hand"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused"])
@pytest.mark.parametrize("kind", SCALERS)
def test_equals_torchs_chain(kind, fused, manual, clip):
    """With fused=True torch's scaler has the step unscale, as it has torch's own."""
    ours, theirs = model(), model()
    a = AdamW(ours.parameters(), 1e-2, max_grad_norm=None if manual else clip, fused=fused)
    assert a._step_supports_amp_scaling == bool(fused)
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
    assert scales == train(
        torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3),
        torch.optim.SGD(theirs.parameters(), 0.01),
        theirs,
    )
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), lambda p: torch.optim.Adagrad(p, 0.1), torch.optim.RMSprop],
    ids=["sgd", "adagrad", "rmsprop"],
)
def test_skips_any_optimizer_by_a_predicated_copy(make):
    """Every bit of parameters and state as it was, and the same results as torch, which reads the flag on the host."""
    ours, theirs = model(), model()
    options = dict(init_scale=8.0, growth_interval=3)
    scaler = GradScaler("cpu", **options)
    a, b = make(ours.parameters()), make(theirs.parameters())
    train(scaler, a, ours, steps=2)
    before = copy.deepcopy([list(ours.parameters()), a.state_dict()["state"]])
    train(scaler, a, ours, steps=1, overflow_at=1)
    for x, y in zip(tensors(before), tensors([list(ours.parameters()), a.state_dict()["state"]]), strict=True):
        assert torch.equal(x, y)
    ours.load_state_dict(model().state_dict())
    a = make(ours.parameters())
    assert train(GradScaler("cpu", **options), a, ours) == train(torch.amp.GradScaler("cpu", **options), b, theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


class Odd(torch.optim.Optimizer):
    """Replaces its state at every step and counts in a group, as optimizers outside torch do."""

    def __init__(self, params):
        super().__init__(params, {"count": 0})

    def step(self):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["m"] = 0.9 * self.state[p].get("m", torch.zeros_like(p)) + p.grad
                    p.data.sub_(0.1 * self.state[p]["m"])


def test_skips_an_optimizer_that_replaces_its_state():
    p = nn.Parameter(torch.ones(2))
    scaler, optimizer = GradScaler("cpu", init_scale=1.0), Odd([p])
    for overflow in (0, 1, 0, 1, 1):
        before = copy.deepcopy((p.detach(), optimizer.state_dict()))
        scaler.scale(torch.ones(()))
        p.grad = torch.full((2,), torch.inf if overflow else 1.0)
        scaler.step(optimizer)
        if overflow:
            assert (
                torch.equal(p, before[0])
                and optimizer.param_groups[0]["count"] == before[1]["param_groups"][0]["count"]
            )
            assert torch.equal(optimizer.state[p]["m"], before[1]["state"][0]["m"])
        scaler.update()
    assert optimizer.param_groups[0]["count"] == 2


def test_a_parameter_may_meet_its_first_gradient_in_a_step_that_overflows():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    scaler, optimizer = GradScaler("cpu", init_scale=1.0), torch.optim.Adam([a, b])
    for of_b in (None, torch.full((2,), torch.inf), torch.ones(2)):
        scaler.scale(torch.ones(()))
        a.grad, b.grad = torch.ones(2), of_b
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[b]["step"] == 1 and optimizer.state[a]["step"] == 2 and b.isfinite().all()


class Beside(torch.optim.Optimizer):
    """Keeps a count and a buffer beside its state, as optimizers outside torch do."""

    def __init__(self, params):
        super().__init__(params, {})
        self.count, self.sum = 0, None

    def step(self):
        self.count += 1
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("m", torch.zeros_like(p)).add_(p.grad)
            self.sum = p.grad.clone() if self.sum is None else self.sum.add_(p.grad)
            p.data.sub_(0.1 * self.sum)


class Nested(torch.optim.Optimizer):
    """Keeps tensors in lists within its state, as Shampoo and SOAP do, and one in its group."""

    def __init__(self, params):
        super().__init__(params, {"seen": torch.zeros(())})

    def step(self):
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                factors = self.state[p].setdefault("factors", [torch.zeros_like(p), torch.zeros_like(p)])
                for factor in factors:
                    factor.add_(p.grad)
                p.data.sub_(0.1 * factors[0] + 0.1 * group["seen"])


class Opaque(Nested):
    """Keeps its tensors in an object that no copy could put back."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("kept", type("Kept", (), {"m": torch.zeros_like(p)})())
            kept.m.add_(p.grad)
            p.data.sub_(0.1 * kept.m)


@pytest.mark.parametrize("make", [Beside, Nested, Opaque])
def test_skips_an_optimizer_wherever_it_keeps_its_state(make):
    """The parameters of torch's scaler after the same overflows."""
    ends = []
    for Scaler in SCALERS.values():
        p = nn.Parameter(torch.ones(3))
        scaler, optimizer = Scaler("cpu", init_scale=8.0), make([p])
        for overflow in (0, 1, 0, 1, 0):
            scaler.scale(torch.ones(()))
            p.grad = torch.full((3,), torch.inf if overflow else 8.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(p.detach())
        assert getattr(optimizer, "count", 3) == 3
    assert ends[0].isfinite().all() and torch.equal(*ends)


@pytest.mark.parametrize(
    "make, waits", [(lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), 0), (Nested, 0), (Beside, 2), (Opaque, 2)]
)
def test_only_what_no_copy_could_put_back_waits_for_the_flag(make, waits, monkeypatch):
    """A first step waits for all; schedules add attributes that do not matter."""
    p, waited = nn.Parameter(torch.ones(3)), []
    scaler, optimizer = GradScaler("cpu", init_scale=8.0), make([p])
    if "lr" in optimizer.defaults:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    step = torch.amp.GradScaler.step
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda *args: (waited.append(1), step(*args))[1])
    for _ in range(3):
        scaler.scale(torch.ones(()))
        p.grad = torch.full((3,), 8.0)
        scaler.step(optimizer)
        scaler.update()
    assert len(waited) == 1 + waits


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for x in (tree.values() if isinstance(tree, dict) else tree) for t in tensors(x)]


def run_scale(scaler, overflows):
    """The scale after each of a list of steps that overflow (1) or not (0)."""
    p = nn.Parameter(torch.zeros(1))
    optimizer, scales = torch.optim.SGD([p], 0.0), []
    for overflow in overflows:
        scaler.scale(torch.ones(()))
        p.grad = torch.full((1,), torch.inf if overflow else 0.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_hysteresis_forgives_until_the_scale_grows():
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=3, hysteresis=2)
    assert run_scale(scaler, [1, 1, 1, 0, 0, 0, 1, 1]) == [8, 4, 2, 2, 2, 4, 4, 2]


def test_the_overflow_of_one_optimizer_counts_for_all():
    scaler = GradScaler("cpu", init_scale=8.0, hysteresis=2)
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizers = [AdamW(params[:1]), torch.optim.SGD(params[1:], 0.1)]
    for _ in range(2):
        scaler.scale(torch.ones(()))
        params[0].grad, params[1].grad = torch.full((1,), torch.inf), torch.ones(1)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4 and params[0] == 0 and params[1] != 0


def test_hysteresis_survives_a_state_dict():
    scaler = GradScaler("cpu", init_scale=8.0, hysteresis=2)
    run_scale(scaler, [1])
    again = GradScaler("cpu", hysteresis=2)
    again.load_state_dict(scaler.state_dict())
    assert run_scale(again, [1]) == [4]


def test_the_floor_holds_and_is_reported():
    scaler = GradScaler("cpu", init_scale=4.0, min_scale=1.0)
    assert run_scale(scaler, [1, 1]) == [2, 1]
    scaler.check()
    assert run_scale(scaler, [1]) == [1]
    with pytest.raises(FloatingPointError, match=r"fell to its floor 1: .* train in bf16"):
        scaler.check()


@pytest.mark.parametrize(
    "name, first, after",
    [
        ("torch", 2.0**16, [2.0**15, 2.0**14]),
        ("fairseq", 2.0**7, [64, 32]),
        ("deepspeed", 2.0**16, [2.0**16, 2.0**15]),
        ("megatron", 2.0**32, [2.0**32, 2.0**31]),
    ],
)
def test_presets(name, first, after):
    scaler = GradScaler.preset(name, "cpu")
    assert scaler.get_scale() == first and run_scale(scaler, [1, 1]) == after
    with pytest.raises(ValueError, match="'apex' is unknown; choose from torch, fairseq"):
        GradScaler.preset("apex")


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


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(min_scale=-1.0), "min_scale is -1.0; give a finite number of at least 0"),
        (dict(min_scale=16.0, init_scale=8.0), "min_scale is 16.0 and init_scale 8.0; begin at the floor or above"),
        (dict(hysteresis=1.5), "hysteresis is 1.5; give a whole number of at least 1"),
        (dict(growth_interval=0), "growth_interval is 0; give a whole number of at least 1"),
        *[(dict(init_scale=x), f"init_scale is {x}; give a positive, finite number") for x in (0, -1.0, float("inf"))],
        (dict(process_group=3), "process_group is 3; give a group of torch.distributed"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradScaler("cpu", **options)


def test_disabled_scaler_steps():
    net = model()
    before = copy.deepcopy(net.state_dict())
    scaler = GradScaler("cpu", enabled=False)
    train(scaler, AdamW(net.parameters()), net, steps=2)
    assert not torch.equal(before["0.weight"], net[0].weight)

"""Parameters of 16 bits that something else writes while they are trained: what is written is the parameter from then
on, and what is not keeps its master or remainder.
"""

import copy

import pytest
import torch
from bits import assert_same_bits
from formulas import KINDS
from torch import nn

import fastlm
from fastlm import optim
from fastlm.ops.optim.precision import Parameter, split

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = [(BF16, "fp32"), (F16, "fp32"), (BF16, "remainder")]
ADAMW = dict(lr=1e-2, weight_decay=0.1)


def made(choice, params, **more):
    return optim.OPTIMIZERS[choice.optimizer](params, **choice.options, **more)


def step(optimizer, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)
    optimizer.step()


def parameter(dtype):
    return nn.Parameter(torch.randn(24, 9, generator=torch.Generator().manual_seed(3)).to(dtype))


def exact(optimizer, p):
    """The parameter that the optimizer goes on from, in fp32."""
    state = optimizer.state[p]
    return Parameter(p.detach(), state["master"] if "master" in state else state["remainder"], None).read()


def in_place(p, new):
    with torch.no_grad():
        p.copy_(new)


def as_data(p, new):
    p.data.copy_(new)


def instead(p, new):
    p.data = new.clone()


def loaded(p, new):
    module = nn.Module()
    module.p = p
    module.load_state_dict({"p": new})


@pytest.mark.parametrize("write", [in_place, as_data, instead, loaded], ids=lambda write: write.__name__)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_training_goes_on_from_what_was_written(dtype, backend, write):
    """Into some rows of a parameter with a master: the same fp32 bits as where a parameter of fp32 is written."""
    for choice in KINDS:
        p = parameter(dtype)
        wide = nn.Parameter(p.detach().float())
        ours, theirs = made(choice, [p], master="fp32"), made(choice, [wide])
        with fastlm.use_backend(backend):
            for seed in range(6):
                if seed == 3:
                    new = torch.cat([torch.linspace(-2, 2, 10 * 9).view(10, 9).to(dtype), p.detach()[10:]])
                    write(p, new)
                    wide.data[:10] = new[:10].float()
                    assert torch.equal(exact(ours, p), wide)
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
                wide.grad = p.grad.float()
                ours.step(), theirs.step()
        assert torch.equal(exact(ours, p), wide) and torch.equal(p, wide.to(dtype))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype, master", CASES, ids=str)
def test_what_was_written_outlives_a_step_that_moves_nothing(dtype, master, backend):
    """Zeros of both signs too, which a remainder from before would turn into NaN."""
    p = parameter(dtype)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, master=master)
    with fastlm.use_backend(backend):
        step(optimizer), step(optimizer, 1)
        new = torch.tensor([0.0, -0.0, 100.0, 1.0, -3e-5, 0.3]).repeat(36).view(24, 9).to(dtype)
        p.data.copy_(new)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.state[p]["momentum_buffer"].zero_()
        step(optimizer, scale=0.0)
    after = exact(optimizer, p)
    assert torch.equal(p, new) and not after.isnan().any()
    assert torch.equal(split(after)[0] if master == "remainder" else after.to(dtype), new)


@pytest.mark.parametrize("dtype, master", CASES, ids=str)
def test_weights_that_are_swapped_and_put_back_lose_no_bits(dtype, master):
    """As averages of weights are, to evaluate them."""
    ends = []
    for swaps in (False, True):
        p = parameter(dtype)
        optimizer = optim.AdamW([p], **ADAMW, master=master)
        for seed in range(4):
            step(optimizer, seed)
            if swaps:
                before = p.detach().clone()
                in_place(p, torch.ones_like(before)), in_place(p, before)
        ends.append([p.detach(), exact(optimizer, p)])
    assert_same_bits(*ends)


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("dtype, master", CASES, ids=str)
def test_a_checkpoint_loads_in_either_order(dtype, master, first):
    p, q = parameter(dtype), parameter(dtype)
    optimizer, again = (optim.AdamW([x], **ADAMW, master=master) for x in (p, q))
    for seed in range(3):
        step(optimizer, seed), step(again, 10 + seed)
    saved, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    loads = [lambda: loaded(q, weights), lambda: again.load_state_dict(saved)]
    for load in loads if first == "model" else reversed(loads):
        load()
    step(optimizer, 5), step(again, 5)
    assert_same_bits([p.detach(), exact(optimizer, p)], [q.detach(), exact(again, q)])


def test_a_master_that_another_class_carried_along_does_not_come_back():
    """torch's AdamW keeps what else is in a state dict, and trains the parameter alone."""
    p = parameter(BF16)
    ours, theirs = optim.AdamW([p], **ADAMW, master="fp32"), torch.optim.AdamW([p], **ADAMW)
    step(ours)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for seed in range(3):
        step(theirs, seed)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert torch.equal(exact(ours, p).to(BF16), p)

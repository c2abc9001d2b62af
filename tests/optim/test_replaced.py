"""The classes of torch and transformers that optimizers replace: the same numbers, and state dicts both ways."""

import copy

import pytest
import torch
import transformers
from bits import assert_same_bits
from formulas import KINDS
from steps import PRECISIONS, make, params_and_grads, share_grads, twins
from torch import nn

from fastlm import optim

HF = transformers.optimization.Adafactor
TWINS = [
    (optim.AdamW, torch.optim.AdamW, {}),
    (optim.AdamW, torch.optim.AdamW, dict(lr=3e-3, maximize=True, foreach=True)),
    (optim.AdamW, torch.optim.AdamW, dict(lr=3e-3, weight_decay=0.0, betas=(0.0, 0.5), capturable=False)),
    (optim.Adam, torch.optim.Adam, dict(weight_decay=0.1, fused=True)),
    (optim.Adam, torch.optim.Adam, dict(weight_decay=0.1, maximize=True)),
    (optim.SGD, torch.optim.SGD, dict(lr=0.1)),
    (optim.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)),
    (optim.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True, foreach=True)),
    (optim.Adafactor, torch.optim.Adafactor, dict(lr=1e-2)),
    (
        optim.Adafactor,
        torch.optim.Adafactor,
        dict(lr=0.1, weight_decay=0.1, beta2_decay=-0.6, d=2.0, eps=(1e-3, 1e-2), maximize=True),
    ),
    (optim.Adafactor, HF, dict()),
    (optim.Adafactor, HF, dict(warmup_init=True)),
    (
        optim.Adafactor,
        HF,
        dict(lr=1e-3, relative_step=False, scale_parameter=False, weight_decay=0.1, beta1=0.9, clip_threshold=0.5),
    ),
]


TWIN_IDS = [f"{theirs.__module__.split('.')[0]}-{theirs.__name__}-{options}" for _, theirs, options in TWINS]


def variant_of(ours, theirs) -> dict:
    return {} if ours is not optim.Adafactor else dict(variant="huggingface" if theirs is HF else "torch")


@pytest.mark.parametrize("ours, theirs, options", TWINS, ids=TWIN_IDS)
def test_equals_the_class_it_replaces(ours, theirs, options):
    params, new_grads = params_and_grads(((40, 30), (4,), (), (3, 6, 4)))
    others = twins(params)
    a, b = ours(params, **options, **variant_of(ours, theirs)), theirs(others, **options)
    for _ in range(20):
        new_grads(), share_grads(params, others)
        a.step(), b.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ours, theirs, options", TWINS, ids=TWIN_IDS)
def test_state_dicts_go_both_ways(ours, theirs, options):
    """Three steps there, then the same step by them, by us from their state, and by them from ours."""
    params, new_grads = params_and_grads(((6, 5), (4,), (3, 6, 4)))
    others = twins(params)
    b = theirs([{"params": others[:1]}, {"params": others[1:]}], **options)
    for _ in range(3):
        new_grads(), share_grads(params, others)
        b.step()
    mine, back = twins(others), twins(others)
    a = ours([{"params": mine[:1]}, {"params": mine[1:]}], **options, **variant_of(ours, theirs))
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    c = theirs([{"params": back[:1]}, {"params": back[1:]}], **options)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    new_grads()
    for xs, optimizer in ((others, b), (mine, a), (back, c)):
        share_grads(params, xs)
        optimizer.step()
    for p, q, r in zip(others, mine, back, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(r, p, rtol=1e-6, atol=1e-6)


def test_momentum_that_is_switched_on_later_starts_from_the_gradient():
    """torch's buffer begins as a whole gradient, however many steps went before; what is switched off and on again goes
    on.
    """
    params, new_grads = params_and_grads()
    others = twins(params)
    a, b = optim.SGD(params, lr=0.1, dampening=0.5, max_grad_norm=1e9), torch.optim.SGD(others, lr=0.1, dampening=0.5)
    for momentum in (0.0, 0.0, 0.9, 0.9, 0.0, 0.9):
        a.param_groups[0]["momentum"] = b.param_groups[0]["momentum"] = momentum
        new_grads()
        params[0].grad[0, 0] = torch.inf
        a.step()  # skipped: nothing has begun
        params[0].grad[0, 0] = 1.0
        share_grads(params, others)
        a.step(), b.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_a_state_dict_continues_with_the_same_bits(choice, precision):
    dtype, options = PRECISIONS[precision]
    params, new_grads = params_and_grads(choice.shapes, dtype)
    ours = make(choice, params, **options)
    for _ in range(2):
        new_grads(), ours.step()
    copies = twins(params)
    again = make(choice, copies, **options)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_same_bits([ours.state[p] for p in params], [again.state[p] for p in copies])
    new_grads(), share_grads(params, copies)
    ours.step(), again.step()
    assert_same_bits(list(params), copies)


@pytest.mark.parametrize("theirs", ["NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop"])
@pytest.mark.parametrize("ours", [optim.Adam, optim.AdamW, optim.LAMB, optim.SGD, optim.Adafactor])
def test_states_of_optimizers_that_ours_do_not_stand_in_for_are_refused(theirs, ours):
    p = nn.Parameter(torch.ones(3, 3))
    other = getattr(torch.optim, theirs)([p], lr=0.1)
    p.grad = torch.ones(3, 3)
    other.step()
    with pytest.raises(ValueError, match="saved"):
        ours([p], lr=0.1).load_state_dict(other.state_dict())


def test_adafactor_refuses_an_lr_that_its_relative_step_would_not_read():
    group = {"params": [nn.Parameter(torch.ones(4, 4))], "lr": 0.1}
    for options in ({}, {"relative_step": True}):
        with pytest.raises(ValueError, match="give the optimizer an lr, or the group relative_step=False"):
            optim.Adafactor([dict(group)], variant="huggingface", **options)
    assert optim.Adafactor([group | {"relative_step": False}], variant="huggingface").param_groups[0]["lr"] == 0.1

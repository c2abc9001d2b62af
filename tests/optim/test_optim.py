"""Every optimizer against its paper and its definition, on every backend, instruction set and number of threads."""

import copy

import numpy as np
import pytest
import torch
from bits import assert_same_bits, lists_of, tensors
from cases import OPTIMIZERS
from formulas import CHOICES
from steps import BACKENDS, BF16, F16, F32, close, make, params_and_grads, share_grads
from torch import nn

import fastlm
from fastlm import optim
from fastlm.backends import dispatch, native
from fastlm.ops.optim.precision import Parameter
from fastlm.ops.optim.unscale import grad_stats, unscale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_twenty_steps_of_the_paper(choice, backend):
    params, new_grads = params_and_grads(choice.shapes, scale=choice.scale)
    theta, states = [p.detach().numpy().astype(np.float64) for p in params], [{} for _ in params]
    optimizer = make(choice, params)
    for t in range(1, 21):
        new_grads()
        theta = [
            choice.formula(x, p.grad.numpy().astype(np.float64), s, t)
            for x, p, s in zip(theta, params, states, strict=True)
        ]
        with fastlm.use_backend(backend):
            optimizer.step()
    for p, exact in zip(params, theta, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("master", ["fp32", "remainder"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_masters_and_remainders_are_fp32_training(choice, master):
    """The same bf16 gradients give fp32 parameters, masters and bf16 + remainder the same bits."""
    if choice.options.get("variant") == "torch" and choice.optimizer == "adafactor" and "eps" not in choice.options:
        choice = copy.copy(choice)
        # torch's default depends on the dtype
        object.__setattr__(choice, "options", choice.options | dict(eps=(2.0**-23, 1e-3)))
    params, new_grads = params_and_grads(choice.shapes, BF16)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    ours, theirs = make(choice, params, master=master), make(choice, wide)
    for _ in range(5):
        new_grads(), share_grads(params, wide)
        ours.step(), theirs.step()
    for p, q in zip(params, wide, strict=True):
        rest = ours.state[p]["master" if master == "fp32" else "remainder"]
        assert torch.equal(Parameter(p.detach(), rest, None).read(), q)
        assert (p.float() - q).abs().max() <= 2**-8 * q.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.LAMB])
def test_small_gradients_survive_large_ones(make, backend):
    """Without momentum the average is the last gradient, to the bit, whatever came before."""
    p = nn.Parameter(torch.ones(5))
    optimizer = make([p], betas=(0.0, 0.95))
    for size in (1e6, 1e-3, 3e4, 1e-7):
        p.grad = size * torch.linspace(-1.0, 0.7, 5)
        with fastlm.use_backend(backend):
            optimizer.step()
        assert_same_bits(optimizer.state[p]["exp_avg"], p.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Backends, instruction sets, threads


@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_ops_agree_with_their_definitions(case, dtype):
    """C++ in every instruction set: the definition's numbers to rounding, and the same bits in all sets."""
    op, make = dispatch.OPS[case.op], lambda: case.make(dtype, torch.device("cpu"))
    expected = make()
    with fastlm.use_backend("reference"):
        op(*expected)
    active, first = native.cpu().active(), None
    try:
        for isa in native.cpu().available():
            native.cpu().use(isa)
            got = make()
            with fastlm.use_backend("cpp"):
                op(*got)
            # one ulp of fp32 may turn a rounding; the sets agree all the same
            if "noise" not in case.name or first is not None:
                for x, y in zip(tensors(lists_of(got)), tensors(lists_of(first or expected)), strict=True):
                    close(x, y) if first is None else assert_same_bits(x, y)
            first = first or got
    finally:
        native.cpu().use(active)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_instruction_set_rounds_as_torch_does(dtype):
    """fp32 masters of any bits, many or few of them subnormal or NaN: the instruction for bf16 takes subnormals for
    zero. A parameter that torch rounded is its master, rounded, and leaves it as it is.
    """
    patterns = torch.randint(-(2**31), 2**31, (100_003,), generator=torch.Generator().manual_seed(0)).int()
    patterns[::2] = patterns[::2] & ~0x7F800000  # subnormal
    patterns[50_000:] = (0.01 * torch.randn(50_003)).view(torch.int32)
    patterns[60_000:100_000:5_000] = torch.tensor(
        [0x1, -0x7FFFFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7F7FFFFF, 0x8000, 0x0]
    ).int()
    masters, rule = patterns.view(F32), (0.0, 0.0, 0.0, 0.0, False)  # which moves nothing
    active = native.cpu().active()
    try:
        for isa in native.cpu().available():
            native.cpu().use(isa)
            p, master = masters.to(dtype), masters.clone()
            rounded, number = p.clone(), masters.isfinite()  # 0 · inf is NaN
            with fastlm.use_backend("cpp"):
                dispatch.OPS["sgd"]([p], [master], [], [torch.zeros_like(p)], [], [torch.zeros(())], None, None, *rule)
            assert torch.equal(master[number].view(torch.int32), patterns[number])
            assert (
                torch.equal(p[number].view(torch.int16), rounded[number].view(torch.int16)) and p[~number].isnan().all()
            )
    finally:
        native.cpu().use(active)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_results_do_not_depend_on_threads(choice):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            params, new_grads = params_and_grads(((900, 700), (30, 20), (5,), (1000, 1100)), scale=1e-3)
            optimizer = make(choice, params, max_grad_norm=1.0)
            new_grads(), optimizer.step()
            results.append([list(params), [optimizer.state[p] for p in params]])
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1]), assert_same_bits(results[0], results[2])


def test_ops_are_proper_operators():
    for case in OPTIMIZERS:
        if case.name in ("mixed_shapes", "bare", "remainders", "plain"):
            torch.library.opcheck(dispatch.OPS[case.op].torch_op, case.make(BF16, torch.device("cpu")))
    grads = [torch.randn(3, 4), torch.randn(5)]
    torch.library.opcheck(grad_stats.torch_op, (grads, torch.tensor(2.0), 1.0))
    torch.library.opcheck(unscale.torch_op, (grads, torch.tensor(2.0), torch.zeros(())))


# ---------------------------------------------------------------------------------------------------------------------
# Groups, memory, registry


def test_every_optimizer_is_covered():
    assert {choice.optimizer for choice in CHOICES} == set(optim.OPTIMIZERS)
    assert all(optim.OPTIMIZERS[name].__name__.lower() == name for name in optim.OPTIMIZERS)

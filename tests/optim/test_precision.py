"""Rounding at random, remainders, and parameters that need no master."""

import pytest
import torch
from bits import assert_same_bits
from cases import OPTIMIZERS
from steps import BACKENDS, BF16, F16, F32
from torch import nn

import fastlm
from fastlm import optim
from fastlm.backends import dispatch, native
from fastlm.ops.optim.precision import Parameter, philox, split, stochastic_round
from fastlm.optim.states import MASTERS


def test_philox_has_the_published_bits():
    """Known answers of Random123's philox4x32 with 10 rounds, in C++ and in the definition."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, (low, high), words in known:
        key = high << 32 | low
        assert tuple(native.cpu().philox(counter, key)) == words
        assert tuple(int(w) for w in philox(tuple(torch.tensor(c) for c in counter), key)) == words


@pytest.mark.parametrize("x", [1.0, -1.00123, 3.3e-5, 1e-39, 0.0, 255.7])
def test_noise_is_unbiased(x):
    """The mean of 100,000 roundings is x to four standard errors, and each is one of x's two neighbours."""
    n = 100_000
    rounded = stochastic_round(torch.full((n,), x), 5, torch.tensor(3.0)).double()
    exact = torch.tensor(x).double()
    gap = rounded.max() - rounded.min()
    assert (rounded - exact).abs().max() <= gap.clamp(min=0) and rounded.unique().numel() <= 2
    assert (rounded.mean() - exact).abs() <= 4 * gap / 2 / n**0.5


def test_cpp_rounds_by_the_definitions_noise():
    """A step of plain SGD with lr 1 from zero is the rounding itself: the same bits, odd lengths and transposed
    parameters included.
    """
    for p in (nn.Parameter(torch.zeros(3, 2051, dtype=BF16)), nn.Parameter(torch.zeros(50, 7, dtype=BF16).T)):
        p.grad = torch.randn(p.shape)[:].to(BF16).as_strided(p.shape, p.stride()).contiguous() / 3
        grad, bits = p.grad.clone(), []
        for backend in BACKENDS:
            p.data.zero_()
            p.grad = grad
            optimizer = optim.SGD([p], lr=1 / 3, master="stochastic", seed=11)
            with fastlm.use_backend(backend):
                optimizer.step(), optimizer.step()
            bits.append(p.detach().clone())
        assert torch.equal(*bits)


def test_noise_lets_small_updates_through():
    """An update of a tenth of an ulp is lost to rounding, and arrives by noise."""
    plain, noisy = nn.Parameter(torch.ones(4000, dtype=BF16)), nn.Parameter(torch.ones(4000, dtype=BF16))
    for p, master in ((plain, None), (noisy, "stochastic")):
        optimizer = optim.SGD([p], lr=2**-11, master=master)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert (plain == 1).all() and abs(noisy.double().mean().item() - (1 - 20 * 2**-11)) < 4e-4


def test_noise_differs_between_parameters_steps_and_seeds():
    draws = {
        (seed, index): stochastic_round(torch.full((64,), 1.001), seed << 32 | index, torch.tensor(1.0))
        for seed in (0, 1)
        for index in (0, 1)
    }
    draws["step"] = stochastic_round(torch.full((64,), 1.001), 0, torch.tensor(2.0))
    assert len({tuple(x.tolist()) for x in draws.values()}) == 5


def test_remainders_are_exact():
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    special = torch.tensor([0.0, -0.0, 1e-45, torch.inf, -torch.inf, 3.4028235e38, 1.0, -1.5])
    x = torch.cat([bits.view(F32), special])
    high, low = split(x)
    back = Parameter(high, low, None).read()
    numbers = ~x.isnan()
    assert (
        torch.equal(back.view(torch.int32)[numbers], x.view(torch.int32)[numbers])
        and back[~numbers].isnan().all()
        and high[~numbers].isnan().all()
    )
    near = numbers & (x.abs() < 3e38)
    assert ((high.float() - x).abs()[near] <= 2**-8 * x.abs()[near] + 1e-40).all()


@pytest.mark.parametrize("master", MASTERS)
def test_fp32_parameters_need_no_master(master):
    p = nn.Parameter(torch.randn(5))
    optimizer = optim.AdamW([p], master=master)
    p.grad = torch.randn(5)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("case", [c for c in OPTIMIZERS if c.name == "mixed_shapes"], ids=str)
def test_gradients_and_parameters_may_differ_in_dtype(case):
    """Gradients of every dtype that hold the same numbers give the same bits."""
    results = []
    for dtype in (F32, BF16, F16):
        args = list(case.make(F32, torch.device("cpu")))
        args[3] = [g.bfloat16().half().to(dtype) for g in args[3]]
        dispatch.OPS[case.op](*args)
        results.append(args[0])
    assert_same_bits(results[0], results[1]), assert_same_bits(results[0], results[2])

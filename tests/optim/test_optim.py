"""Every optimizer against its paper, against torch's and Hugging Face's classes, in every precision, and where
gradients are odd, missing or not finite.
"""

import copy

import numpy as np
import pytest
import torch
import transformers
from bits import assert_same_bits, lists_of, tensors
from cases import OPTIMIZERS
from formulas import CHOICES, KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastlm
from fastlm import optim
from fastlm.backends import dispatch, native
from fastlm.ops.precision import Parameter, philox, split, stochastic_round
from fastlm.ops.unscale import grad_stats, unscale
from fastlm.optim.states import MASTERS

BACKENDS = ("cpp", "reference")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PRECISIONS = {
    "fp32": (F32, {}),
    "bf16": (BF16, {}),
    "fp16": (F16, {}),
    "bf16-masters": (BF16, dict(master="fp32")),
    "fp16-masters": (F16, dict(master="fp32")),
    "bf16-remainders": (BF16, dict(master="remainder")),
    "bf16-noise": (BF16, dict(master="stochastic")),
    "bf16-states": (BF16, dict(state_dtype="bf16")),
}


def make(choice, params, **more):
    return optim.OPTIMIZERS[choice.optimizer](params, **choice.options, **more)


def params_and_grads(shapes=((7, 5), (4,), ()), dtype=F32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    return params, lambda: [setattr(p, "grad", (scale * torch.randn(p.shape, generator=g)).to(dtype)) for p in params]


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def share_grads(params, others):
    for p, q in zip(params, others, strict=True):
        q.grad = None if p.grad is None else p.grad.to(q.dtype, copy=True)


# ---------------------------------------------------------------------------------------------------------------------
# The papers


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
# The classes they replace

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


def close(x, y):
    if x.dtype == torch.int16:  # remainders: the parameter's own bits may carry
        return
    tolerance = dict(rtol=2e-6, atol=2e-6) if x.dtype == F32 else dict(rtol=torch.finfo(x.dtype).eps, atol=1e-6)
    torch.testing.assert_close(x, y, **tolerance)


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
# Precision


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


# ---------------------------------------------------------------------------------------------------------------------
# Clipping, overflow, and odd parameters


@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_gradients_are_only_read(choice):
    """An expanded gradient, as of a sum, does what its contiguous copy does, and neither it nor a transposed one is
    written.
    """
    ends = []
    for copied in (False, True):
        params, _ = params_and_grads(((6, 5), (5,), (4, 3)))
        optimizer = make(choice, params, max_grad_norm=1.0)
        for p, g in zip(
            params,
            (torch.tensor([0.5]).expand(6, 5), torch.tensor(2.0).expand(5), torch.arange(12.0).view(3, 4).T),
            strict=True,
        ):
            p.grad = g.contiguous() if copied else g
        versions = [p.grad._version for p in params]
        optimizer.step(), optimizer.step()
        assert [p.grad._version for p in params] == versions
        ends.append([p.detach() for p in params])
    assert_same_bits(*ends)


NOT_A_NUMBER = [
    ("adamw", dict(scale_by_rms=True)),
    ("lamb", dict(bounds=(1.0, 2.0), weight_decay=0.0)),
    ("lamb", dict(variant="deepspeed")),
    ("adafactor", dict(variant="t5")),
    ("adafactor", dict(variant="torch")),
    ("sgd", dict(momentum=0.9)),
]


@pytest.mark.parametrize("where", ["parameter", "gradient", "infinite parameter"])
@pytest.mark.parametrize("name, options", NOT_A_NUMBER, ids=str)
def test_what_is_not_a_number_spreads_alike(name, options, where):
    """Nothing hides a NaN: what a tensor's sums take with it is the same in C++ and in the definition."""
    ends = []
    for backend in BACKENDS:
        params, new_grads = params_and_grads(((6, 5), (4,)))
        optimizer = optim.OPTIMIZERS[name](params, **options)
        new_grads()
        with torch.no_grad():
            (params[0].grad if where == "gradient" else params[0])[1, 2] = (
                torch.inf if "infinite" in where else torch.nan
            )
        with fastlm.use_backend(backend):
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert ends[0][0].isnan().any() or "infinite" in where
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_is_global_and_reported(backend):
    params, new_grads = params_and_grads()
    theirs = twins(params)
    a = optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=0.1)
    b = torch.optim.AdamW(theirs)
    for _ in range(5):
        new_grads(), share_grads(params, theirs)
        with fastlm.use_backend(backend):
            a.step()
        norm = nn.utils.clip_grad_norm_(theirs, 0.1)
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, bad", [("cpp", float("inf")), ("cpp", float("nan")), ("reference", float("-inf"))])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_a_step_that_is_skipped_changes_no_bit(choice, precision, backend, bad):
    dtype, options = PRECISIONS[precision]
    params, new_grads = params_and_grads(dtype=dtype)
    optimizer = make(choice, params, max_grad_norm=1.0, **options)
    new_grads(), optimizer.step()
    before = copy.deepcopy([list(params), optimizer.state_dict()["state"]])
    new_grads()
    params[1].grad[2] = bad
    with fastlm.use_backend(backend):
        optimizer.step()
    assert optimizer.overflow == 1 and not optimizer.grad_norm.isfinite()
    assert_same_bits(before, [list(params), optimizer.state_dict()["state"]])
    new_grads(), optimizer.step()
    assert optimizer.overflow == 0 and optimizer.state[params[0]]["step"] == 2


SHAPES = st.lists(
    st.one_of(
        st.just(()), st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 6), st.integers(0, 6)), st.just((2, 3, 4))
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(CHOICES), st.sampled_from(sorted(PRECISIONS)), SHAPES, st.data())
def test_any_mix_of_parameters_follows_the_definition(choice, precision, shapes, data):
    """Empty, scalar, transposed, strided, frozen, added later, without a gradient at times: C++ and definition
    agree.
    """
    dtype, options = PRECISIONS[precision]
    layouts = [data.draw(st.sampled_from(["plain", "transposed", "strided"])) for _ in shapes]
    frozen = [data.draw(st.booleans()) and i > 0 for i, _ in enumerate(shapes)]
    missing = [[data.draw(st.booleans()) for _ in shapes] for _ in range(3)]
    results = []
    for backend in BACKENDS:
        g = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(laid_out(torch.randn(s, generator=g).to(dtype), how), requires_grad=not f)
            for s, how, f in zip(shapes, layouts, frozen, strict=True)
        ]
        optimizer = make(choice, params[:1], max_grad_norm=10.0, **options)
        for step in range(3):
            if step == 1 and params[1:]:
                optimizer.add_param_group({"params": params[1:]})
            for p, absent in zip(params, missing[step], strict=True):
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
                p.grad = None if absent or not p.requires_grad else p.grad
            with fastlm.use_backend(backend):
                optimizer.step()
        results.append([p.detach() for p in params])
    ulps = 64 if dtype == F32 else 2
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=ulps * torch.finfo(dtype).eps, atol=1e-6 if dtype == F32 else 1e-2)


def laid_out(x, how):
    if how == "transposed":
        return x.mT.contiguous().mT if x.ndim > 1 else x
    return torch.stack((x, x), -1)[..., 0] if how == "strided" else x


def test_schedules_hooks_and_closures():
    params, _ = params_and_grads()
    optimizer = optim.AdamW(params, lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    schedule.step()
    assert seen == ["before", "after"] and optimizer.param_groups[0]["lr"] == 0.5


def test_no_gradients_is_no_step():
    params, _ = params_and_grads()
    optim.AdamW(params, max_grad_norm=1.0).step()


def test_copies_and_pickles_keep_the_clip():
    params, _ = params_and_grads()
    assert copy.deepcopy(optim.AdamW(params, max_grad_norm=0.5)).max_grad_norm == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("adamw", dict(lr=-1.0), "lr is -1.0"),
        ("adamw", dict(betas=(1.0, 0.9)), r"betas are \(1.0, 0.9\)"),
        ("adamw", dict(amsgrad=True), "amsgrad is True: .* is not served here"),
        ("adamw", dict(variant="google"), "choose from 'torch', 'bert'"),
        ("adamw", dict(max_grad_norm=0.0), "max_grad_norm is 0.0"),
        ("adamw", dict(master="fp8"), "choose from None, 'fp32', 'remainder', 'stochastic'"),
        ("adamw", dict(state_dtype="fp16"), "choose from 'fp32', 'bf16'"),
        ("adamw", dict(seed=-1), "seed is -1"),
        ("sgd", dict(nesterov=True), "nesterov takes momentum > 0"),
        ("lamb", dict(variant="nvidia"), "choose from 'paper', 'google', 'apex', 'deepspeed'"),
        ("lamb", dict(bounds=(2.0, 1.0)), "0 ≤ low ≤ high"),
        ("adafactor", dict(variant="keras"), "choose from 't5', 'huggingface', 'torch'"),
        ("adafactor", dict(lr=1e-3, relative_step=True), "do not go together"),
        ("adafactor", dict(lr=1e-3, warmup_init=True), "takes lr=None"),
        ("adafactor", dict(variant="t5", weight_decay=0.1), "has no weight decay"),
        ("adafactor", dict(variant="torch", beta1=0.9), "has no momentum"),
        ("adafactor", dict(decay_rate=0.8), "at most 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        optim.OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_what_cannot_be_stepped_is_refused_before_anything_changes(name):
    make = optim.OPTIMIZERS[name]
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"shape \[4, 2\] has a sparse gradient; build its Embedding with sparse=False"
    ):
        make(embedding.parameters()).step()
    with pytest.raises(ValueError, match="complex"):
        make([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="expanded"):
        make([nn.Parameter(torch.zeros(1, 3).expand(4, 3))])
    optimizer = make([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="fp16; legal there: None, 'fp32'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=F16))], "master": "remainder"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("choice", KINDS, ids=str)
def test_a_parameter_that_changed_its_size_is_refused(choice):
    """A state of another size must not reach C++ as an address."""
    params, new_grads = params_and_grads()
    optimizer = make(choice, params)
    new_grads(), optimizer.step()
    if len(optimizer.state[params[0]]) == 1:
        pytest.skip("keeps nothing of the parameter's size")
    params[0].data = torch.zeros(700, 500)
    new_grads()
    with pytest.raises(ValueError, match=r"\[0\] has shape \[7(, 5)?\], and its parameter needs \[700(, 500)?\]"):
        optimizer.step()


@pytest.mark.parametrize(
    "case, position, i, wrong, message",
    [
        (
            "adamw-mixed_shapes",
            6,
            1,
            torch.tensor(3),
            r"steps\[1\] is torch.int64 on cpu; it must be torch.float32 on cpu",
        ),
        ("sgd-mixed_shapes", 5, 0, torch.zeros(0), r"steps\[0\] has shape \[0\], and its parameter needs \[\]"),
        ("adafactor-mixed_shapes", 4, 0, torch.zeros(64, dtype=BF16), r"rows\[0\] is torch.bfloat16"),
        (
            "adafactor-mixed_shapes",
            5,
            3,
            torch.zeros(2, 50),
            r"cols\[3\] has shape \[2, 50\], and its parameter needs \[3, 50\]",
        ),
        (
            "lamb-masters",
            1,
            0,
            torch.zeros(64, 32),
            r"masters\[0\] has shape \[64, 32\], and its parameter needs \[64, 33\]",
        ),
        (
            "adamw-mixed_shapes",
            3,
            0,
            torch.zeros(33, 64),
            r"grads\[0\] has shape \[33, 64\], and its parameter needs \[64, 33\]",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(case, position, i, wrong, message):
    args = next(c for c in OPTIMIZERS if str(c) == case).make(BF16, torch.device("cpu"))
    args[position][i] = wrong
    with pytest.raises(ValueError, match=message), fastlm.use_backend("cpp"):
        dispatch.OPS[case.split("-")[0]](*args)


# ---------------------------------------------------------------------------------------------------------------------
# grad_stats and unscale


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_grad_stats(dtype):
    grads = [g.to(dtype) for g in (torch.randn(1000, 33), torch.randn(5), torch.randn(0), torch.randn(8, 6).T)]
    expected = torch.cat([g.double().flatten() for g in grads]).norm() / 8
    for backend in BACKENDS:
        with fastlm.use_backend(backend):
            norm, coefficient, overflow = grad_stats(grads, torch.tensor(8.0), 2.0)
            torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(
                coefficient.double(), min(1.0, 2.0 / (expected + 1e-6)) / 8, rtol=1e-6, atol=0, check_dtype=False
            )
            assert overflow == 0
            assert grad_stats([*grads, torch.tensor([torch.inf]).to(dtype)], None, 0.0)[2] == 1
            assert grad_stats(grads, torch.tensor(8.0), 0.0)[1] == 0.125


@pytest.mark.parametrize("size", [1e-40, 1e-38, 1e-25, 1e25, 3e38])
def test_cpp_norm_survives_extreme_gradients(size):
    grads = [torch.full((5003,), size)]
    norm = grad_stats(grads, None, 0.0)[0].double()
    exact = grads[0].double().norm()
    assert (norm - exact).abs() <= 1e-6 * exact or exact > 3.4e38


def test_the_norm_does_not_depend_on_threads():
    grads = [torch.randn(300_000), torch.randn(77)]
    threads = torch.get_num_threads()
    try:
        norms = [[torch.set_num_threads(n), grad_stats(grads, None, 1.0)[0].item()][1] for n in (1, 2, 3, 7)]
    finally:
        torch.set_num_threads(threads)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_unscale(backend):
    grads = [torch.randn(40, 3).T, torch.randn(9).half()]
    expected = [g * 0.25 for g in grads]
    flag = torch.zeros(())
    with fastlm.use_backend(backend):
        unscale(grads, torch.tensor(0.25), flag)
        assert flag == 0
        for g, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(g, e)
        unscale([torch.tensor([1.0, torch.nan])], torch.tensor(1.0), flag)
    assert flag == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_unscale_of_expanded_gradients(backend):
    """What elements share is multiplied once."""
    grads = [torch.tensor(2.0).expand(3, 4), torch.arange(4.0).expand(3, 4), torch.arange(3.0)[:, None].expand(3, 4)]
    expected = [0.25 * g for g in grads]
    with fastlm.use_backend(backend):
        unscale(grads, torch.tensor(0.25), torch.zeros(()))
    assert_same_bits(grads, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Groups, memory, registry


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


def test_every_optimizer_is_covered():
    assert {choice.optimizer for choice in CHOICES} == set(optim.OPTIMIZERS)
    assert all(optim.OPTIMIZERS[name].__name__.lower() == name for name in optim.OPTIMIZERS)

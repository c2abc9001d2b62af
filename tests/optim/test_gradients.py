"""Clipping, overflow, and gradients that are odd, missing or not finite."""

import copy

import pytest
import torch
from bits import assert_same_bits
from formulas import CHOICES, KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import BACKENDS, BF16, F16, F32, PRECISIONS, make, params_and_grads, share_grads, twins
from torch import nn

import fastlm
from fastlm import optim
from fastlm.ops.optim.unscale import grad_stats, unscale


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

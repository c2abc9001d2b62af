"""Dispatch: ranked choice, forced choice, refusals in words, and the torch.library operator around each definition."""

import warnings

import pytest
import torch
from cases import ATTENTION
from torch import Tensor

from fastlm.backends import dispatch
from fastlm.backends.dispatch import BackendError, SlowPathWarning, op, use_backend
from fastlm.ops.attention import attention

ABSENT = "its compiler was not found; cure: install it"


@pytest.fixture
def halve():
    """An op with a fast backend that refuses long inputs, and one that is missing."""

    @op
    def halve(x: Tensor) -> Tensor:
        """x / 2"""
        return x / 2

    calls = []

    @halve.backend("absent", devices=("cpu",), missing=lambda device: ABSENT)
    def _(x):
        raise AssertionError("unreachable")

    @halve.backend(
        "fast",
        devices=("cpu",),
        refuses=lambda x: f"x has {x.numel()} elements, at most 4 are served" if x.numel() > 4 else None,
    )
    def _(x):
        calls.append("fast")
        return x * 0.5

    @halve.gradient(save=lambda ctx, inputs, output: None)
    def _(ctx, grad):
        return halve(grad)

    halve.calls = calls
    halve._told.add(("absent", ABSENT))
    yield halve
    del dispatch.OPS["halve"]
    halve.torch_op._lib._destroy()


def test_the_fastest_present_backend_runs(halve):
    assert halve(torch.ones(3)).tolist() == [0.5] * 3
    assert halve.calls == ["fast"]
    assert halve.names() == ["absent", "fast", "reference"]


def test_a_missing_backend_is_told_once(halve):
    halve._told.clear()
    with pytest.warns(SlowPathWarning, match=f"backend 'absent' is missing: {ABSENT}"):
        halve(torch.ones(3))
    halve(torch.ones(3))


def test_a_refusal_is_told_once(halve):
    with pytest.warns(SlowPathWarning, match="x has 5 elements, at most 4"):
        assert halve(torch.ones(5)).tolist() == [0.5] * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        halve(torch.ones(5))
    assert halve.calls == []


def test_forced_backends_run_or_raise(halve):
    with use_backend("reference"):
        halve(torch.ones(3))
    assert halve.calls == []
    with use_backend(halve="fast"), pytest.raises(BackendError, match="at most 4 are served"):
        halve(torch.ones(5))
    with use_backend(halve="absent"), pytest.raises(BackendError, match="cure: install it"):
        halve(torch.ones(1))
    with (
        pytest.raises(BackendError, match="halve has no backend 'nonsense'; choose from absent, fast, reference"),
        use_backend(halve="nonsense"),
    ):
        pass
    with pytest.raises(BackendError, match="no op is named 'nothing'"), use_backend(nothing="reference"):
        pass


def test_the_innermost_choice_wins(halve):
    with use_backend(halve="fast"), use_backend("reference"):
        halve(torch.ones(1))
        assert halve.calls == []
        with use_backend(halve="fast"):
            halve(torch.ones(1))
    assert halve.calls == ["fast"]


def test_threads_that_leave_in_another_order_leave_nothing_behind(halve):
    first, second = use_backend("reference"), use_backend(halve="fast")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced_backend("halve") == "fast"
    second.__exit__(None, None, None)
    assert dispatch.forced_backend("halve") is None


def test_the_environment_chooses(halve, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "reference")
    halve(torch.ones(1))
    assert halve.calls == []
    with use_backend(halve="fast"):
        halve(torch.ones(1))
    assert halve.calls == ["fast"]


def test_gradient_and_compile(halve):
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: halve(x).sum(), fullgraph=True, backend="aot_eager")(x).backward()
    assert x.grad.tolist() == [0.5] * 3
    torch.library.opcheck(halve.torch_op, (torch.ones(3, requires_grad=True),))


def test_explain_names_every_backend():
    for each in dispatch.OPS.values():
        rows = dict(each.explain(torch.device("cpu")))
        assert rows.pop("reference") is None
        assert all(reason is None or len(reason) > 10 for reason in rows.values())


def test_autocast_does_not_reach_into_definitions():
    args = ATTENTION[0].make(torch.float32, torch.device("cpu"))
    with use_backend("reference"):
        plain, _ = attention(*args)
        with torch.autocast("cpu", torch.bfloat16):
            inside, _ = attention(*args)
    assert torch.equal(plain, inside)

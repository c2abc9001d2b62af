"""Dispatch: ranked choice, forced choice, refusals in words, and the torch.library operator around each definition."""

import warnings
from typing import Annotated, NamedTuple

import pytest
import torch
from cases import ATTENTION
from own_ops import forget
from torch import Tensor

from fastlm.backends import dispatch
from fastlm.backends.dispatch import BackendError, SlowPathWarning, op, record_choices, use_backend
from fastlm.ops.attention import attention

ABSENT = "its compiler was not found; cure: install it"


@pytest.fixture
def halve():
    """An op with a fast backend that refuses long inputs, and one that is unavailable."""

    @op
    def halve(x: Tensor) -> Tensor:
        """x / 2"""
        return x / 2

    calls = []

    @halve.backend("absent", devices=("cpu",), unavailable=lambda device: ABSENT)
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
    forget(halve)


class Line(NamedTuple):
    slope: Annotated[Tensor, "a scalar"]
    x: Tensor | None
    shift: float


@pytest.fixture
def line():
    """An op whose arguments have names, before and after others; its gradient is one too. Each keeps who asked what."""

    @op
    def line(start: Tensor, a: Line, times: int) -> Tensor:
        return times * (start + a.slope * a.x + a.shift)

    @op(gradient_of=line)
    def line_backward(grad: Tensor, a: Line, times: int) -> Tensor:
        return times * grad * a.x

    line.asked = []

    @line.backend(
        "whole", devices=("cpu",), refuses=lambda *args: line.asked.append("whole") or "", differentiable=True
    )
    def _(start, a, times):
        raise AssertionError("unreachable")

    @line.backend("fast", devices=("cpu",), refuses=lambda start, a, times: line.asked.append("fast"))
    def _(start, a, times):
        assert isinstance(a, Line)
        return times * torch.add(start + a.shift, a.slope * a.x)

    @line_backward.backend("fast", devices=("cpu",))
    def _(grad, a, times):
        return line_backward.definition(grad, a, times)

    def save(ctx, inputs, output):
        _, a, ctx.times = inputs
        ctx.save_for_backward(a.slope, a.x)

    @line.gradient(save=save)
    def _(ctx, grad):
        slope = line_backward(grad, Line(*ctx.saved_tensors, 0.0), ctx.times).sum()
        return ctx.times * grad, Line(slope, None, None), None

    yield line
    forget(line_backward)
    forget(line)


def test_the_fastest_present_backend_runs(halve):
    assert halve(torch.ones(3)).tolist() == [0.5] * 3
    assert halve.calls == ["fast"]
    assert halve.names() == ["absent", "fast", "reference"]


def test_an_unavailable_backend_is_told_once(halve):
    halve._told.clear()
    with pytest.warns(SlowPathWarning, match=f"backend 'absent' is unavailable: {ABSENT}"):
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


def test_named_arguments_are_one_by_one_to_the_operator(line):
    schema = str(line.torch_op._opoverload._schema)
    assert schema == "fastlm::line(Tensor start, Tensor slope, Tensor? x, float shift, SymInt times) -> Tensor"
    start, x = torch.zeros(3, requires_grad=True), torch.arange(3.0)
    slope = torch.tensor(2.0, requires_grad=True)
    run = lambda start, slope: line(start, Line(slope, x, 0.5), 2)
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = f(start, slope)
        assert out.tolist() == [1.0, 5.0, 9.0]
        assert [g.tolist() for g in torch.autograd.grad(out.sum(), (start, slope))] == [[2.0] * 3, 6.0]
    torch.library.opcheck(line.torch_op, (start, slope, x, 0.5, 2))


def test_each_backend_is_asked_once_in_a_call(line):
    line(torch.zeros(3), Line(torch.tensor(2.0), torch.zeros(3), 0.5), 2)
    assert line.asked == ["whole", "fast"]


def test_a_choice_for_an_op_is_one_for_its_gradient(line):
    with use_backend(line="fast"):
        assert dispatch.forced_backend("line_backward") == "fast"
        with use_backend(line_backward="reference"):
            assert dispatch.forced_backend("line_backward") == "reference"
    with use_backend(line="whole"):  # which the gradient lacks
        assert dispatch.forced_backend("line_backward") is None


def test_choices_are_recorded(line):
    slope = torch.tensor(2.0, requires_grad=True)
    with record_choices() as outer:
        with record_choices() as chosen, use_backend(line_backward="reference"):
            line(torch.zeros(3), Line(slope, torch.zeros(3), 0.5), 2).sum().backward()
        attention(ATTENTION[0].make(torch.float32, torch.device("cpu")))
    assert chosen == {"line": "fast", "line_backward": "reference"}
    assert outer == chosen | {"attention": "sdpa"}
    assert dispatch._records == []


def test_explain_names_every_backend():
    for each in dispatch.OPS.values():
        rows = dict(each.explain(torch.device("cpu")))
        assert rows.pop("reference") is None
        assert all(reason is None or len(reason) > 10 for reason in rows.values())


def test_autocast_does_not_reach_into_definitions():
    args = ATTENTION[0].make(torch.float32, torch.device("cpu"))
    with use_backend("reference"):
        plain, _ = attention(args)
        with torch.autocast("cpu", torch.bfloat16):
            inside, _ = attention(args)
    assert torch.equal(plain, inside)

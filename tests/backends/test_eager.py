"""Calls without torch.library's operator: who looks on gets the operator, and nobody can tell the two apart."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import ATTENTION, EMBEDDING, GATE, NORM, ROTATE
from own_ops import forget
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.backends import dispatch
from fastlm.backends.dispatch import OPS, op, use_backend
from fastlm.ops.attention import Arguments, attention

CPU = torch.device("cpu")


@pytest.fixture
def weigh():
    """An op of two results whose gradient keeps what it was told. `by_operator` counts the calls that were one."""

    @op
    def weigh(x: Tensor, weight: Tensor | None, by: float) -> tuple[Tensor, Tensor]:
        return x * by * (1 if weight is None else weight), x.abs() + 1

    def save(ctx, inputs, output):
        x, weight, ctx.by = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, output[1])

    @weigh.gradient(save=save)
    def _(ctx, grad, grad_abs):
        weigh.told.append((ctx.needs_input_grad, grad is None, grad_abs is None))
        x, weight, _ = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad
        dx = ctx.by * grad * (1 if weight is None else weight)
        return dx, None if weight is None else ctx.by * grad * x, None

    weigh.told, weigh.by_operator, operator = [], 0, weigh.torch_op

    def counted(*values):
        weigh.by_operator += 1
        return operator(*values)

    weigh.torch_op = counted
    yield weigh
    weigh.torch_op = operator
    forget(weigh)


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Overrides(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A subclass that PyTorch's functions keep."""


class Scales(nn.Parameter):
    """A parameter of another library's."""


def negated(x: Tensor) -> Tensor:
    """x as it comes out of complex numbers: what lies in memory is -x."""
    lazily = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazily.is_neg() and type(lazily) is Tensor
    return lazily


def functional(x: Tensor) -> Tensor:
    return torch._to_functional_tensor(x)


SEEN = {  # a mode, or what a tensor is made
    "fake tensors": (FakeTensorMode, lambda x: x.clone()),
    "functional tensors": (FunctionalTensorMode, lambda x: x),
    "a dispatch mode": (Dispatches, lambda x: x),
    "a counter of operations": (partial(FlopCounterMode, display=False), lambda x: x),
    "a function mode": (Overrides, lambda x: x),
    "a default device": (lambda: torch.device("cpu"), lambda x: x),
    "a subclass": (nullcontext, lambda x: x.as_subclass(Named)),
    "a subclass of parameters": (nullcontext, Scales),
    "a fake tensor outside its mode": (nullcontext, lambda x: FakeTensorMode().from_tensor(x)),
    "shapes alone": (nullcontext, lambda x: x.to("meta")),
    "a tensor to be negated": (nullcontext, negated),
    "a tensor of zeros that are nowhere": (nullcontext, lambda x: torch._efficientzerotensor(x.shape)),
    "a functional wrapper": (nullcontext, functional),
}


@pytest.mark.parametrize("who", SEEN)
def test_who_looks_on_gets_the_operator(weigh, who):
    mode, make = SEEN[who]
    with mode():
        x = make(torch.arange(3.0))
        out, _ = weigh(x, None, 2.0)
    assert weigh.by_operator == 1
    assert out.shape == (3,)
    if who in (
        "a dispatch mode",
        "a function mode",
        "a subclass",
        "a subclass of parameters",
        "a tensor to be negated",
    ):
        assert out.tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("name", ["attention", "rms_norm", "rotate", "gated"])
def test_kernels_read_a_tensor_to_be_negated_as_what_it_is(name):
    case = next(case for case in (*ATTENTION, *NORM, *ROTATE, *GATE) if case.op == name)
    args = case.make(torch.float32, CPU)
    first, *others = args if name in ("rotate", "gated") else args[0] if name == "rms_norm" else args
    plain, lazily = first, negated(first)
    put = lambda x: (x, *others) if name in ("rotate", "gated") else (args._replace(**{args._fields[0]: x}),)
    with use_backend(**{name: "cpp"}) if "cpp" in OPS[name].names() else nullcontext():
        expected, got = OPS[name](*put(plain)), OPS[name](*put(lazily))
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
        assert torch.equal(a, b)


QUIET = {
    "nothing": nullcontext,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "hooks of saved tensors": torch.autograd.graph.save_on_cpu,
    "anomalies looked for": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("where", QUIET)
@pytest.mark.parametrize("make", [lambda x: x, nn.Parameter, nn.Buffer], ids=["tensor", "parameter", "buffer"])
def test_where_nobody_does_there_is_none(weigh, where, make):
    with QUIET[where]():
        assert weigh(make(torch.arange(3.0)), None, 2.0)[0].tolist() == [0.0, 2.0, 4.0]
    assert weigh.by_operator == 0


def test_a_gradient_is_told_what_the_operators_is_told(weigh, monkeypatch):
    """Which inputs want one, and which results have one."""
    for sees in (dispatch.observed, lambda values: True):
        monkeypatch.setattr(dispatch, "observed", sees)
        x, weight = torch.arange(3.0, requires_grad=True), torch.ones(3, requires_grad=True)
        weigh(x, weight, 2.0)[0].sum().backward()
        weigh(x, weight.detach(), 2.0)[1].sum().backward()
        assert x.grad.tolist() == [2.0] * 3 and weight.grad.tolist() == [0.0, 2.0, 4.0]
    assert weigh.by_operator == 2
    assert weigh.told[:2] == weigh.told[2:] == [((True, True, False), False, True), ((True, False, False), True, False)]


def test_a_backward_pass_goes_through_once_or_as_often_as_asked(weigh):
    x = torch.arange(3.0, requires_grad=True)
    out, _ = weigh(x, None, 2.0)
    grads = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    torch.autograd.grad(out.sum(), x)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out.sum(), x)
    assert weigh.by_operator == 0


@pytest.mark.parametrize("written", ["the input", "the result that is kept"])
def test_a_tensor_written_since_it_was_saved_is_refused(weigh, written):
    x = torch.arange(3.0, requires_grad=True) * 1
    out, kept = weigh(x, None, 2.0)
    with torch.no_grad():
        (x if written == "the input" else kept).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_results_may_be_written_and_hooks_see_gradients(weigh):
    x, seen = torch.arange(3.0, requires_grad=True), []
    out, _ = weigh(x, None, 2.0)
    out.register_hook(seen.append)
    out.mul_(3).sum().backward()
    assert x.grad.tolist() == [6.0] * 3
    assert [grad.tolist() for grad in seen] == [[3.0] * 3]


def test_an_op_without_a_gradient_says_so():
    @op
    def rounded(x: Tensor) -> Tensor:
        return x.round()

    try:
        out = rounded(torch.ones(2, requires_grad=True))
        assert out.requires_grad
        with pytest.raises(RuntimeError, match="fastlm::rounded has no gradient"):
            out.sum().backward()
    finally:
        forget(rounded)


def test_what_is_written_in_place_has_a_new_version():
    """Of an op that writes, which is always its operator."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    before, optimizer = p._version, fastlm.optim.AdamW([p])
    optimizer.step()
    assert p._version > before and optimizer.state[p]["exp_avg"]._version > 0


def test_profiles_name_ops_with_gradients_and_without():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    args = Arguments.of(q, q, q, right=0, table=torch.zeros(2, 9))
    with torch.profiler.profile() as profile:
        attention(args)[0].sum().backward()
    times = [event.key for event in profile.key_averages() if event.key.startswith("fastlm::")]
    assert sorted(times) == ["fastlm::attention", "fastlm::attentionBackward", "fastlm::attention_backward"]


# ---------------------------------------------------------------------------------------------------------------------
# Every op: the same bits

CASES = [*ATTENTION, *ROTATE, *NORM, *GATE, *EMBEDDING]


def results(case, dtype) -> list[Tensor]:
    """What the op returns and the gradient of every tensor that may have one, whose leaves are new each time."""
    args = case.make(dtype, CPU)
    args = (args,) if hasattr(args, "_fields") else args
    values = OPS[case.op].signature.flatten(args)
    leaves = [x.clone().requires_grad_() if is_float(x) else x for x in values]
    made = OPS[case.op](*OPS[case.op].signature.unflatten(tuple(leaves)))
    made = [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None and x.requires_grad]
    g = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=g).to(x.dtype)).sum() for x in made[: 1 + (case.op != "attention")])
    learned = [x for x in leaves if is_float(x)]
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    return [*made, *found]


def is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_the_operators(case, dtype, monkeypatch):
    backend = "cpp" if "cpp" in OPS[case.op].names() and not fastlm.backends.native.cpp_missing(CPU) else "reference"
    with use_backend(**{case.op: backend}):
        ours = results(case, dtype)
        monkeypatch.setattr(dispatch, "observed", lambda values: True)
        operators = results(case, dtype)
    for a, b in zip(ours, operators, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("around", ["checkpoint", "checkpoint that keeps some"])
def test_checkpointed_modules_learn_the_same(around, reentrant, monkeypatch):
    if around == "checkpoint that keeps some" and reentrant:
        pytest.skip("PyTorch's selective checkpointing is not reentrant")
    torch.manual_seed(0)
    block = nn.Sequential(fastlm.nn.RMSNorm(16), fastlm.nn.Attention(16, heads=2, position="alibi"))
    x = torch.randn(2, 5, 16, requires_grad=True)
    options = {}
    if around == "checkpoint that keeps some":
        keeps = lambda ctx, func, *args, **kwargs: torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
        options["context_fn"] = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, keeps)
    found = []
    with use_backend(rms_norm="cpp") if not fastlm.backends.native.cpp_missing(CPU) else nullcontext():
        for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant, **options)):
            twin = copy.deepcopy(x.detach()).requires_grad_()
            block.zero_grad()
            run(twin).square().sum().backward()
            found.append([twin.grad, *(p.grad.clone() for p in block.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_compiled_backward_pass_of_an_eager_forward():
    """Compiled autograd reads the functions' backward as it does the operators'."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    table = torch.randn(2, 9, requires_grad=True)

    def loss():
        normed = OPS["rms_norm"](fastlm.ops.norm.Arguments(q, None, weight, None, 1e-5, 0.0, False))[0]
        return attention(Arguments.of(normed, q, q, right=0, table=table))[0].square().sum()

    leaves = (q, weight, table)
    with use_backend("reference"):
        loss().backward()
        expected = [x.grad for x in leaves]
        for x in leaves:
            x.grad = None
        torch.compiler.reset()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss().backward()
    for x, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(x.grad, grad)

"""Activations, gated or not, by every backend: the tolerance rule, threads, and what PyTorch does to operators."""

import pytest
import torch
from cases import GATE
from gated import assert_gate_accurate, results

import fastlm
from fastlm.backends import native
from fastlm.backends.dispatch import OPS
from fastlm.ops.gate import ACTIVATIONS, activated, gated
from fastlm.ops.gate import curve as curve_of

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUILT = native.cpp_missing(CPU) is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_derivatives(activation):
    x = torch.linspace(-6, 6, 50, dtype=torch.float64).requires_grad_()
    f, slope = curve_of(x, activation)
    torch.testing.assert_close(torch.autograd.grad(f.sum(), x)[0], slope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATE, ids=str)
def test_it_is_as_accurate_as_pytorch(case, dtype):
    with fastlm.use_backend("reference"):
        assert_gate_accurate(case, dtype, CPU)


@pytest.mark.skipif(not BUILT, reason="the C++ extension is not built")
class TestCpp:
    @pytest.fixture(autouse=True)
    def by_cpp(self, poisoned):
        with fastlm.use_backend("cpp"):
            yield

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", GATE, ids=str)
    def test_every_instruction_set_is_as_accurate_whatever_the_threads(self, case, dtype, threads):
        active = native.cpu().active()
        try:
            for isa in native.cpu().available():
                native.cpu().use(isa)
                assert_gate_accurate(case, dtype, CPU)
                x, activation = case.make(dtype, CPU)
                made = []
                for n in (1, 2, 7):
                    threads(n)
                    made.append(results(OPS[case.op], x, activation))
                for other in made[1:]:
                    assert all(torch.equal(other[name], made[0][name]) for name in other)
        finally:
            native.cpu().use(active)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_far_values(self, activation):
        """Zeros and identities far out, and NaN where it was; rtol is exp's bound (csrc/cpu/vector.h) at 30."""
        x = torch.tensor([-1e30, -200.0, -30.0, 30.0, 200.0, 1e15, torch.nan])
        truth = curve_of(x.double(), activation)[0].float()
        torch.testing.assert_close(activated(x, activation), truth, equal_nan=True, atol=1e-30, rtol=3e-6)

    @pytest.mark.parametrize("op", [gated, activated], ids=lambda op: op.name)
    def test_it_is_a_proper_operator(self, op):
        x = torch.randn(3, 8, requires_grad=True)
        some = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op.torch_op, (x, "silu"), test_utils=some)
        compiled = torch.compile(op.__call__, fullgraph=True, backend="aot_eager")
        for got, expected in zip(results(compiled, x, "gelu").values(), results(op, x, "gelu").values(), strict=True):
            assert torch.equal(got, expected)

    def test_views_are_read_as_they_lie(self):
        x = torch.randn(8, 6).T.requires_grad_()
        dy = torch.randn(4, 6).T
        expected = torch.autograd.grad(gated(x.contiguous(), "silu"), x, dy.contiguous())
        torch.testing.assert_close(torch.autograd.grad(gated(x, "silu"), x, dy), expected)

    def test_a_second_derivative_is_refused_with_the_cure(self):
        x = torch.randn(3, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(gated(x, "silu").sum(), x, create_graph=True)
        with pytest.raises(fastlm.BackendError, match=r'more often under fastlm.use_backend\(gated="torch"\)'):
            grad.sum().backward()


def test_small_calls_and_what_pytorch_does_as_well_are_its_own():
    made = lambda op, n, activation="gelu_tanh": op.choose(torch.empty(1, n), activation).name
    faster = "cpp" if BUILT else "torch"
    assert [made(gated, n) for n in (2, 2**17 - 2, 2**17)] == ["torch", "torch", faster]
    assert [made(activated, n) for n in (2, 2**15 - 1, 2**15)] == ["torch", "torch", faster]
    assert made(activated, 2**20, "silu") == "torch"
    x = torch.randn(3, 8, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: gated(x, "silu"), x)

"""Layer norm and RMS norm, by every backend: the tolerance rule, threads, and what PyTorch does to operators."""

import pytest
import torch
from cases import NORM
from normed import LEARNED, assert_norm_accurate, results

import fastlm
from fastlm.backends import native
from fastlm.backends.dispatch import OPS
from fastlm.ops.norm import Arguments, layer_norm, rms_norm

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMED = {str(case): case for case in NORM}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORM, ids=str)
def test_it_is_as_accurate_as_pytorch(case, dtype):
    with fastlm.use_backend("reference"):
        assert_norm_accurate(case, dtype, CPU)


@pytest.mark.skipif(native.cpp_missing(CPU) is not None, reason="the C++ extension is not built")
class TestCpp:
    @pytest.fixture(autouse=True)
    def by_cpp(self, threads, poisoned):
        with fastlm.use_backend("cpp"):
            yield

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", NORM, ids=str)
    def test_it_is_as_accurate_as_pytorch(self, case, dtype):
        assert_norm_accurate(case, dtype, CPU)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", NORM, ids=str)
    def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(self, case, dtype, threads):
        a, active = case.make(dtype, CPU), native.cpu().active()
        expected = results(OPS[case.op], a)
        try:
            for isa in native.cpu().available():
                native.cpu().use(isa)
                for n in (1, 2, 7):
                    threads(n)
                    for key, x in results(OPS[case.op], a).items():
                        assert torch.equal(x, expected[key]), (isa, n, key)
        finally:
            native.cpu().use(active)

    def test_only_what_is_read_has_a_gradient(self):
        a = NAMED["layer_norm-bias"].make(torch.float32, CPU)
        leaves = {name: getattr(a, name).requires_grad_() for name in LEARNED}
        y, s, _ = layer_norm(a)
        whole = torch.autograd.grad((y.sum(), (3 * s).sum()), leaves.values())
        y, s, _ = layer_norm(a)
        of_y = torch.autograd.grad(y.sum(), leaves.values())
        of_s = torch.autograd.grad((3 * layer_norm(a)[1]).sum(), (a.x, a.residual))
        torch.testing.assert_close(whole[:2], tuple(p + q for p, q in zip(of_y, of_s, strict=False)))
        torch.testing.assert_close(whole[2:], of_y[2:])

    @pytest.mark.parametrize("name", ["layer_norm-bias", "layer_norm-alone", "rms_norm-mixed", "rms_norm-no_rows"])
    def test_it_is_a_proper_operator(self, name):
        case = NAMED[name]
        a = case.make(torch.float32, CPU)
        a = a._replace(**{n: getattr(a, n).requires_grad_() for n in LEARNED if getattr(a, n) is not None})
        some = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(OPS[case.op].torch_op, tuple(a), test_utils=some)

    def test_it_compiles_into_one_graph(self):
        a = NAMED["layer_norm-bias"].make(torch.float32, CPU)
        compiled = torch.compile(layer_norm.__call__, fullgraph=True, backend="aot_eager")
        for got, expected in zip(results(compiled, a).values(), results(layer_norm, a).values(), strict=True):
            assert torch.equal(got, expected)

    def test_a_second_derivative_is_refused_with_the_cure(self):
        x = torch.randn(3, 8, requires_grad=True)
        y, *_ = rms_norm(Arguments(x, None, None, None, 1e-5, 0.0, False))
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(fastlm.BackendError, match=r'more often under fastlm.use_backend\(rms_norm="torch"\)'):
            grad.sum().backward()


def test_small_calls_are_pytorchs_and_large_ones_are_not():
    faster = "cpp" if native.cpp_missing(CPU) is None else "torch"
    for op, residual, rows, dtype in (
        (layer_norm, False, 4096, torch.float32),
        (layer_norm, True, 2048, torch.float32),
        (layer_norm, True, 512, torch.bfloat16),
        (rms_norm, False, 16, torch.float32),
    ):
        chosen = []
        for n in (1, rows - 1, rows):
            x = torch.empty(n, 1024, dtype=dtype)
            chosen.append(op.choose(Arguments(x, x if residual else None, None, None, 1e-5, 0.0, False)).name)
        assert chosen == ["torch", "torch", faster]


def test_pytorchs_are_differentiable_often():
    x = torch.randn(3, 8, requires_grad=True, dtype=torch.float64)
    for op in (layer_norm, rms_norm):
        assert torch.autograd.gradgradcheck(lambda x, op=op: op(Arguments(x, x, None, None, 1e-5, 0.0, False))[0], x)

"""Rows of a table by token, by every backend: the tolerance rule, threads, and what PyTorch does to operators."""

import pytest
import torch
from cases import EMBEDDING
from embedded import assert_embedding_accurate, gradient_for, results
from tolerance import max_and_rms

import fastlm
from fastlm.backends import native, pages
from fastlm.ops.embedding import NO_PADDING, embedding, embedding_backward

IDS = torch.tensor([1, 1, 0])
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUILT = native.cpp_missing(CPU) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EMBEDDING, ids=str)
def test_it_is_as_accurate_as_pytorch(case, dtype):
    with fastlm.use_backend(embedding="reference"):
        assert_embedding_accurate(case, dtype, CPU)


def drawn(dtype, padding=NO_PADDING):
    ids, weight, _ = next(case for case in EMBEDDING if case.name == "one_token").make(dtype, CPU)
    return ids, weight, padding


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_sums_of_16_bits_are_rounded_once(backend):
    if backend == "cpp" and not BUILT:
        pytest.skip("the C++ extension is not built")
    ids, weight, padding = drawn(torch.bfloat16)
    with fastlm.use_backend(embedding=backend):
        got = results(embedding, ids, weight, padding)["dweight"]
    truth = results(embedding, ids, weight.double(), padding)["dweight"]
    theirs = results(torch.nn.functional.embedding, ids, weight, None)["dweight"]
    assert torch.equal(got[3], truth[3].to(torch.bfloat16))
    assert max_and_rms(theirs, truth)[1] > 4 * max_and_rms(got, truth)[1]


@pytest.mark.skipif(not BUILT, reason="the C++ extension is not built")
class TestCpp:
    @pytest.fixture(autouse=True)
    def by_cpp(self, poisoned):
        with fastlm.use_backend(embedding="cpp"):
            yield

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", EMBEDDING, ids=str)
    def test_every_instruction_set_gives_the_same_bits_whatever_the_threads(self, case, dtype, threads):
        active, made = native.cpu().active(), []
        try:
            for isa in native.cpu().available():
                native.cpu().use(isa)
                assert_embedding_accurate(case, dtype, CPU)
                for n in (1, 2, 7):
                    threads(n)
                    made.append(results(embedding, *case.make(dtype, CPU)))
        finally:
            native.cpu().use(active)
        for other in made[1:]:
            assert all(torch.equal(other[name], made[0][name]) for name in other)

    def test_sums_are_in_the_places_order(self):
        """In fp32, where another order shows."""
        ids, weight, padding = drawn(torch.float32)
        dy, expected = gradient_for(embedding(ids, weight, padding)).flatten(0, -2), torch.zeros(weight.shape[1])
        for row in dy:
            expected += row
        assert torch.equal(results(embedding, ids, weight, padding)["dweight"][3], expected)

    def test_it_is_a_proper_operator(self):
        ids, weight, _ = drawn(torch.float32)
        some = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(embedding.torch_op, (ids, weight.requires_grad_(), 3), test_utils=some)
        torch.library.opcheck(
            embedding_backward.torch_op, (embedding(ids, weight, 3).detach(), ids, 50, 3), test_utils=some
        )
        compiled = torch.compile(embedding.__call__, fullgraph=True, backend="aot_eager")
        for got, expected in zip(
            results(compiled, ids, weight, 3).values(), results(embedding, ids, weight, 3).values(), strict=True
        ):
            assert torch.equal(got, expected)

    def test_views_are_read_as_they_lie(self):
        ids, weight = torch.randint(9, (6, 8)).T, torch.randn(4, 9).T.requires_grad_()
        dy = torch.randn(4, 6, 8).permute(2, 1, 0)
        expected = torch.autograd.grad(torch.nn.functional.embedding(ids, weight), weight, dy)
        torch.testing.assert_close(torch.autograd.grad(embedding(ids, weight, NO_PADDING), weight, dy), expected)

    def test_a_second_derivative_is_refused_with_the_cure(self):
        ids, weight, padding = drawn(torch.float32)
        y = embedding(ids, weight.requires_grad_(), padding)
        (grad,) = torch.autograd.grad(y, weight, y.detach().requires_grad_(), create_graph=True)
        with pytest.raises(fastlm.BackendError, match=r'more often under fastlm.use_backend\(embedding="torch"\)'):
            grad.sum().backward()

    def test_ids_that_are_no_tokens_are_named(self):
        with pytest.raises(ValueError, match="an id is 7; give 0 to 6"):
            embedding_backward(torch.zeros(2, 3), torch.tensor([0, 7]), 7, NO_PADDING)


def test_small_tables_of_fp32_are_pytorchs_own():
    tokens = pages.LARGE // (4 * 8)
    made = lambda n, dtype: embedding.choose(IDS, torch.empty(n, 8, dtype=dtype), NO_PADDING).name
    faster = "cpp" if BUILT else "torch"
    assert [made(n, torch.float32) for n in (2, tokens - 1, tokens)] == ["torch", "torch", faster]
    assert made(2, torch.bfloat16) == faster and made(tokens, torch.float64) == "torch"
    weight = torch.randn(2, 3, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda weight: embedding(IDS, weight, NO_PADDING), weight)

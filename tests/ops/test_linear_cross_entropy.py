"""linear_cross_entropy against the formula in fp64, beside plain PyTorch; chunks, memory, repeats."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from lost import OPTIONS, Drawn, arguments, assert_loss_accurate, assert_rows_accurate, draw, plain, products, results

import fastlm
from fastlm.backends import native
from fastlm.ops import linear_cross_entropy as module
from fastlm.ops import logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["a few rows at a time", "all at once"])
def chunk(request, monkeypatch):
    if request.param == "a few rows at a time":
        monkeypatch.setattr(logits, "CPU", logits.Chunk(4 * 91 * 4, 1))
        monkeypatch.setattr(logits, "GPU", logits.Chunk(4 * 91 * 2, 1))
        monkeypatch.setattr(logits, "TILE", 10 * 24 * 4)


OPS = ("linear_cross_entropy", "summed_linear_cross_entropy")
CPP_MISSING = native.cpp_missing(torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_error_is_at_most_twice_plain_pytorchs(backend, reduction, options, dtype, chunk):
    if backend == "cpp" and CPP_MISSING:
        pytest.skip(CPP_MISSING)
    with fastlm.use_backend(**dict.fromkeys(OPS, backend)):
        assert_loss_accurate(draw(dtype), reduction, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_products_of_16_bits(reduction, dtype, as_on_a_gpu, chunk):
    """Logits have the operands' dtype, and sums are fp32."""
    with fastlm.use_backend(**dict.fromkeys(OPS, "reference")):
        assert_loss_accurate(draw(dtype), reduction, OPTIONS["all"])
    assert {(x, to) for x, to in as_on_a_gpu} == {(dtype, torch.float32)}
    hidden, weight = draw(dtype).hidden, torch.zeros(91, 24)
    assert logits.operands(arguments(hidden, None, 91)._replace(weight=weight)) == torch.float32


def test_rows_lie_in_whole_vectors_on_a_gpu(as_on_a_gpu):
    hidden, weight, _, labels = draw(torch.bfloat16)
    a = arguments(hidden, None, 91)._replace(hidden=hidden, weight=weight, labels=labels)
    for rows, x in logits.chunks(a):
        assert x.shape == (len(rows), 91) and x.stride() == (128, 1) and x.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [logits.CPU, logits.GPU], ids=["CPU", "GPU"])
def test_a_chunk_is_counted_in_bytes_and_has_rows_enough(size):
    assert size.size(1000, 4, 4096) == size.bytes // 4000
    assert size.size(10**7, 4, 1000) == size.rows
    assert size.size(10**7, 4, 10**6) == 10**6 // 20


@pytest.mark.skipif(CPP_MISSING is not None, reason=str(CPP_MISSING))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(products(dtypes=(torch.float32,), longest=2500))
def test_rows_of_any_size_by_cpp(drawn):
    dtype, x, labels, a = drawn
    assert_rows_accurate(module.CPP, dtype, x.clone(), labels, a)


@pytest.mark.skipif(CPP_MISSING is not None, reason=str(CPP_MISSING))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_instruction_set_is_as_accurate_whatever_the_threads(options, threads):
    """Over a row of several blocks and a rest, whose largest logits come late."""
    hidden, weight, bias, labels = draw(torch.float32, V=2 * 1024 + 37)
    bias, active = bias + torch.linspace(-9, 9, len(bias)), native.cpu().active()
    try:
        for isa in native.cpu().available():
            native.cpu().use(isa)
            bits = []
            for n in (1, 2, 7):
                threads(n)
                bits.append(measured_and_gradient(weight, bias, **options))
            assert all(torch.equal(x, y) for other in bits[1:] for x, y in zip(other, bits[0], strict=True))
            for reduction in ("none", "sum"):
                assert_loss_accurate(Drawn(hidden, weight, bias, labels), reduction, options)
    finally:
        native.cpu().use(active)


def measured_and_gradient(weight, bias, **options):
    """What C++ makes of logits, without the products, whose bits may depend on threads."""
    x = torch.randn(40, len(weight), generator=torch.Generator().manual_seed(0))
    a = arguments(x, bias, len(weight), **options)
    some = torch.arange(40)
    lse, wanted = module.CPP.measure(x, some, a)
    return lse, wanted, module.CPP.gradient(x, some, lse, lse, wanted, a)


@pytest.mark.parametrize("learns", ["hidden", "weight", "bias", "hidden weight", "weight bias"])
def test_what_does_not_learn_costs_no_gradient(learns, monkeypatch):
    *tensors, labels = draw(torch.float32)
    names = ("hidden", "weight", "bias")
    leaves = {name: x.requires_grad_(name in learns) for name, x in zip(names, tensors, strict=True)}
    expected = torch.autograd.grad(plain(*tensors[:2], labels, tensors[2]).sum(), [leaves[n] for n in learns.split()])
    products, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **to: products.append(a) or addmm(*a, **to))
    loss = fastlm.linear_cross_entropy(*tensors[:2], labels, tensors[2], reduction="sum")
    got = torch.autograd.grad(loss, [leaves[name] for name in learns.split()])
    torch.testing.assert_close(got, expected)
    assert len(products) == len({"hidden", "weight"} & {*learns.split()})


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_it_is_differentiable_once_and_says_so(reduction):
    *tensors, labels = draw(torch.float32)
    hidden, weight = (x.requires_grad_() for x in tensors[:2])
    loss = fastlm.linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(fastlm.BackendError, match=r"differentiable once; F\.cross_entropy"):
        grad.square().sum().backward()


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_words_without_a_share(reduction):
    """Logits of -∞, a whole block of them first."""
    hidden, weight, _, _ = draw(torch.float32, V=2000)
    bias = torch.zeros(2000).index_fill_(0, torch.arange(1100), -torch.inf)
    labels = torch.arange(1100, 1137)
    made = []
    for function in (lambda *a: fastlm.linear_cross_entropy(*a, reduction=reduction), plain):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves, labels, bias)
        made.append((loss.sum(), *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*made)


def test_reductions_are_pytorchs():
    hidden, weight, bias, labels = draw(torch.float32)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction)
        torch.testing.assert_close(
            fastlm.linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction), expected
        )


def test_rows_without_target_cost_no_product(monkeypatch):
    """And no row at all is a loss of zero, with zero gradients."""
    *tensors, labels = draw(torch.float32)
    seen = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **to: (seen.append(len(a)), mm(a, b, **to))[1])
    fastlm.linear_cross_entropy(*tensors[:2], labels)
    assert sum(seen) == (labels != -100).sum()
    without = Drawn(*tensors, torch.full_like(labels, -100))
    made = results(lambda *a: fastlm.linear_cross_entropy(*a, reduction="none"), without)
    assert not any(x.any() for x in made.values())


def test_bits_repeat():
    function = lambda *a: fastlm.linear_cross_entropy(*a, reduction="none")
    first = results(function, draw(torch.bfloat16))
    for _ in range(20):
        for name, got in results(function, draw(torch.bfloat16)).items():
            assert torch.equal(got, first[name]), name


def test_compiled():
    hidden, weight, bias, labels = draw(torch.float32)
    hidden.requires_grad_()
    loss = lambda h: fastlm.linear_cross_entropy(h, weight, labels, bias)
    expected = torch.autograd.grad(loss(hidden), hidden)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden), hidden)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(label_smoothing=1.0), "label_smoothing is 1.0"),
        (dict(softcap=0.0), "softcap is 0.0"),
        (dict(reduction="average"), "reduction is 'average'"),
        (dict(bias=torch.zeros(3)), r"bias is \[3\]"),
        (dict(labels=torch.zeros(37)), "labels are torch.float32"),
    ],
)
def test_what_is_refused(change, words):
    hidden, weight, _, labels = draw(torch.float32)
    with pytest.raises(ValueError, match=words):
        fastlm.linear_cross_entropy(hidden, weight, **dict(labels=labels) | change)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_graphs_last_backward_pass_takes_the_memory_of_what_forward_kept(backend):
    if backend == "cpp" and CPP_MISSING:
        pytest.skip(CPP_MISSING)
    hidden, weight, _, labels = draw(torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with fastlm.use_backend(**dict.fromkeys(OPS, backend)):
        loss = 3 * fastlm.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    kept = {x.data_ptr() for x in loss.grad_fn.next_functions[0][0].next_functions[0][0].saved_tensors}
    last = torch.autograd.grad(loss, leaves)
    assert not kept & {x.data_ptr() for x in (*first, *second)} and {x.data_ptr() for x in last} <= kept
    for same in zip(first, second, last, strict=True):
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=torch.tensor([0, 10])), "labels hold 10; give 0 to 9, or ignore_index -100 for no target"),
        (dict(labels=torch.tensor([0, -1])), "labels hold -1"),
        (dict(labels=[0, 1]), "labels is of type list"),
        (dict(hidden=torch.zeros(2, 4, dtype=torch.int64)), "hidden is torch.int64"),
        (dict(hidden=torch.zeros(2, 4, dtype=torch.complex64)), "hidden is torch.complex64"),
        (dict(weight=torch.zeros(0, 4)), r"weight torch.float32 \[0, 4\]; give floats"),
        (dict(ignore_index=1.5), "ignore_index is 1.5; give an integer"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else None,
)
def test_what_is_no_call_is_refused(change, message):
    call = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(10, 4), labels=torch.tensor([0, -100]))
    with pytest.raises(ValueError, match=message):
        fastlm.linear_cross_entropy(**call | change)


def test_it_compiles_whole_under_autocast():
    hidden, weight, _, labels = draw(torch.float32)
    loss = lambda *given: fastlm.linear_cross_entropy(*given)
    with torch.autocast("cpu"):
        expected, got = (
            f(hidden, weight, labels) for f in (loss, torch.compile(loss, backend="eager", fullgraph=True))
        )
    torch.testing.assert_close(got, expected)

"""linear_cross_entropy against the formula in fp64, beside plain PyTorch; chunks, memory, repeats."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.backends import native
from fastlm.ops import linear_cross_entropy as module
from fastlm.ops import logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "smoothed": dict(label_smoothing=0.1),
    "z-loss": dict(z_loss=1e-2),
    "capped": dict(softcap=2.0, temperature=0.7),
    "all": dict(label_smoothing=0.1, z_loss=1e-2, softcap=2.0, temperature=1.3),
}


def draw(dtype, N=37, D=24, V=91):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((N, D), (V, D), (V,)))
    labels = torch.randint(V, (N,), generator=g)
    labels[::5] = -100
    return hidden, weight, bias, labels


def plain(hidden, weight, labels, bias, label_smoothing=0.0, z_loss=0.0, softcap=None, temperature=1.0):
    x = F.linear(hidden, weight, bias)
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    loss = F.cross_entropy(x, labels, reduction="none", label_smoothing=label_smoothing)
    return (loss + z_loss * x.logsumexp(-1).square()).where(labels != -100, 0)


def with_gradients(function, tensors, labels, dtype, **options):
    """function gives a loss for each row, which have weights of their own, or their sum."""
    hidden, weight, bias = (x.detach().to(dtype).requires_grad_() for x in tensors)
    loss = function(hidden, weight, labels, bias, **options)
    weights = torch.linspace(0.5, 1.5, len(labels)).to(loss) if loss.ndim else 1.5
    return (loss.detach(), *torch.autograd.grad((loss * weights).sum(), (hidden, weight, bias)))


@pytest.fixture(params=["a few rows at a time", "all at once"])
def chunk(request, monkeypatch):
    if request.param == "a few rows at a time":
        monkeypatch.setattr(logits, "CHUNK", 4 * 91 * 4)
        monkeypatch.setattr(logits, "ROWS", 1)
        monkeypatch.setattr(logits, "TILE", 10 * 24 * 4)


OPS = ("linear_cross_entropy", "summed_linear_cross_entropy")
CPP_MISSING = native.cpp_missing(torch.device("cpu"))


def assert_accurate(drawn, dtype, reduction, options):
    *tensors, labels = drawn
    reduced = lambda *a, **o: plain(*a, **o) if reduction == "none" else plain(*a, **o).sum()
    truth = with_gradients(reduced, tensors, labels, torch.float64, **options)
    theirs = with_gradients(reduced, tensors, labels, dtype, **options)
    ours = with_gradients(
        lambda *a, **o: fastlm.linear_cross_entropy(*a, reduction=reduction, **o), tensors, labels, dtype, **options
    )
    for got, other, true in zip(ours, theirs, truth, strict=True):
        ulp = 4 * torch.finfo(got.dtype).eps * (1 + true.abs().max())
        assert (got - true).abs().max() <= 2 * (other - true).abs().max() + ulp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_error_is_at_most_twice_plain_pytorchs(backend, reduction, options, dtype, chunk):
    if backend == "cpp" and CPP_MISSING:
        pytest.skip(CPP_MISSING)
    with fastlm.use_backend(**dict.fromkeys(OPS, backend)):
        assert_accurate(draw(dtype), dtype, reduction, options)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """16 bits are multiplied as they are, and added up in fp32, for which a CPU has no product of its own."""
    mm, seen = torch.mm, []

    def product(x, y, out_dtype=None, out=None):
        seen.append((x.dtype, y.dtype, out_dtype))
        return mm(x, y, out=out) if out_dtype is None else mm(x.to(out_dtype), y.to(out_dtype), out=out)

    monkeypatch.setattr(logits, "multiplies_16_bits", lambda device: True)
    monkeypatch.setattr(torch, "mm", product)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_products_of_16_bits(reduction, dtype, as_on_a_gpu, chunk):
    assert_accurate(draw(dtype), dtype, reduction, OPTIONS["all"])
    of_16_bits = [operands for operands in as_on_a_gpu if operands[:2] == (dtype, dtype) and dtype.itemsize == 2]
    assert all(to == torch.float32 for *_, to in of_16_bits) and bool(of_16_bits) == (dtype.itemsize == 2)
    weight = torch.zeros(91, 24)
    assert logits.operands(module.Arguments(draw(dtype)[0], weight, *7 * [None])) == torch.float32


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
                bits.append(measured_and_gradient(weight, bias, labels, **options))
            assert all(torch.equal(x, y) for other in bits[1:] for x, y in zip(other, bits[0], strict=True))
            for reduction in ("none", "sum"):
                assert_accurate((hidden, weight, bias, labels), torch.float32, reduction, options)
    finally:
        native.cpu().use(active)


def measured_and_gradient(weight, bias, labels, label_smoothing=0.0, z_loss=0.0, softcap=0.0, temperature=1.0):
    """What C++ makes of logits, without the products, whose bits may depend on threads."""
    x = torch.randn(40, len(weight), generator=torch.Generator().manual_seed(0))
    a = module.Arguments(x, weight, bias, labels, -100, label_smoothing, z_loss, softcap, temperature)
    some = torch.arange(40)
    lse, wanted = module.CPP.measure(x, some, a)
    return lse, wanted, module.CPP.gradient(x, some, lse, lse, wanted, a)


@pytest.mark.parametrize("learns", ["hidden", "weight", "bias", "hidden weight", "weight bias"])
def test_what_does_not_learn_costs_no_gradient(learns, monkeypatch):
    *tensors, labels = draw(torch.float32)
    names = ("hidden", "weight", "bias")
    leaves = {name: x.requires_grad_(name in learns) for name, x in zip(names, tensors, strict=True)}
    expected = torch.autograd.grad(plain(*tensors[:2], labels, tensors[2]).sum(), [leaves[n] for n in learns.split()])
    products, addmm_ = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a: products.append(a) or addmm_(*a))
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
    loss, *grads = with_gradients(
        lambda *a: fastlm.linear_cross_entropy(*a, reduction="none"),
        tensors,
        torch.full_like(labels, -100),
        torch.float32,
    )
    assert not any(x.any() for x in (loss, *grads))


def test_bits_repeat():
    *tensors, labels = draw(torch.bfloat16)
    function = lambda *a: fastlm.linear_cross_entropy(*a, reduction="none")
    first = with_gradients(function, tensors, labels, torch.bfloat16)
    for _ in range(20):
        for got, expected in zip(with_gradients(function, tensors, labels, torch.bfloat16), first, strict=True):
            assert torch.equal(got, expected)


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

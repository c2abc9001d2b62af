"""Attention in C++: every instruction set by the tolerance rule, the same bits for any number of threads, and what it does not take.

Results start as NaN here (torch fills empty tensors when it is asked to be deterministic), so an element nobody wrote shows.
"""

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from cases import ATTENTION
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_attention_accurate, attention_truth, leaves_of, with_gradients

import fastlm
from fastlm import native
from fastlm.dispatch import BackendError
from fastlm.masks import UNBOUNDED
from fastlm.ops.attention import LEARNED, Arguments, attention, attention_backward, scores
from fastlm.philox import kept

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if native.cpp_missing(CPU):
    pytest.skip(native.cpp_missing(CPU), allow_module_level=True)


@pytest.fixture(autouse=True)
def cpp_and_poison():
    torch.use_deterministic_algorithms(True)
    with fastlm.use_backend(attention="cpp", attention_backward="cpp"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=native.cpu().available())
def isa(request):
    before = native.cpu().active()
    native.cpu().use(request.param)
    yield request.param
    native.cpu().use(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(B=1, H=2, Hk=2, Lq=70, Lk=70, D=32, dtype=torch.float32, table=True, **given) -> Arguments:
    q, k, v = draw(B, H, Lq, D, dtype=dtype), draw(B, Hk, Lk, D, dtype=dtype, seed=1), draw(B, Hk, Lk, D, dtype=dtype, seed=2)
    return Arguments.of(q, k, v, table=draw(H, Lq + Lk - 1, seed=3) if table else None, **given)


def with_terms(args: Arguments, names: list[str]) -> Arguments:
    """args with the terms and masks of these names (TERMS) drawn as well."""
    (B, H, Lq, D), (Hk, Lk), dtype = args.q.shape, args.k.shape[1:3], args.q.dtype
    ints = lambda high, *shape, seed: torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
    ids = lambda name, high: {f"{side}_{name}": ints(high, B, n, seed=n) for side, n in (("q", Lq), ("k", Lk))}
    vectors = lambda seed: draw(H, Lq + Lk - 1, D, dtype=dtype, seed=seed)
    drawn = {
        "prefix": lambda: dict(prefix=ints(Lk + 3, B, seed=5)),
        "segments": lambda: {name: x.sort(-1).values for name, x in ids("segments", 3).items()},
        "ranks": lambda: ids("ranks", Lk),
        "dropout": lambda: dict(dropout=0.3, seed=2**63 - 9),
        "bias": lambda: dict(bias=draw(B, H, Lq, Lk, dtype=dtype, seed=6)),
        "bias of the batch": lambda: dict(bias=draw(1, H, Lq, Lk, dtype=dtype, seed=6)),
        "bias of heads": lambda: dict(bias=draw(B, 1, Lq, Lk, seed=6)),
        "one bias": lambda: dict(bias=draw(1, 1, Lq, Lk, dtype=dtype, seed=6)),
        "bias of keys": lambda: dict(bias=draw(1, H, 1, Lk, seed=6)),
        "bias of queries": lambda: dict(bias=draw(B, 1, Lq, 1, seed=6)),
        "groups": lambda: dict(same=draw(B, H, Lq, seed=7), **ids("groups", 2)),
        "query vectors": lambda: dict(query_vectors=vectors(8)),
        "query vectors and positions": lambda: dict(query_vectors=vectors(8), q_position=draw(B, H, Lq, D, dtype=dtype, seed=9)),
        "key vectors": lambda: dict(key_vectors=vectors(10)),
        "key vectors and positions": lambda: dict(key_vectors=vectors(10), k_position=draw(B, Hk, Lk, D, dtype=dtype, seed=11)),
        "value vectors": lambda: dict(value_vectors=vectors(12)),
    }
    for name in names:
        args = args._replace(**drawn[name]())
    return args


MASKS = ["prefix", "segments", "ranks"]
TERMS = [
    *MASKS, "dropout", "bias", "bias of the batch", "bias of heads", "one bias", "bias of keys", "bias of queries", "groups",
    "query vectors", "query vectors and positions", "key vectors", "key vectors and positions", "value vectors",
]  # fmt: skip


def results(args: Arguments) -> dict[str, torch.Tensor]:
    leaves = leaves_of(args)
    out, lse = attention(*args._replace(**leaves))
    return with_gradients(out, leaves, draw(*args.q.shape, dtype=args.q.dtype, seed=4)) | {"lse": lse.detach()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_cpp_is_accurate(case, dtype, isa):
    assert_attention_accurate(case.make(dtype, CPU))


MANY_TURNS = {  # several units of work for each key head, more than one tile of keys
    "bidirectional": dict(H=2, Hk=1, Lq=600, Lk=520),
    "causal": dict(H=2, Hk=2, Lq=700, Lk=700, right=0),
    "diagonal": dict(Lq=600, Lk=600, left=0, right=0),  # neighbouring units share no key
    "window": dict(Lq=600, Lk=600, left=70, right=3),
    "lengths": dict(B=2, H=2, Hk=1, Lq=530, Lk=400, key_lengths=torch.tensor([130, 400])),
    "wide": dict(H=2, Hk=1, Lq=300, Lk=200, D=256),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MANY_TURNS)
def test_cpp_bits_do_not_depend_on_threads(name, dtype, threads):
    args = arguments(dtype=dtype, **MANY_TURNS[name])
    threads(1)
    alone = results(args)
    for n in (2, 3, 7):
        threads(n)
        for key, got in results(args).items():
            assert torch.equal(got, alone[key]), f"{key} differs with {n} threads"
    assert_attention_accurate(args)


MANY_TERMS = {
    "masks": (MASKS, dict(B=2, H=2, Hk=1, Lq=530, Lk=400, left=40, right=0)),
    "prefix of a window": (["prefix", "value vectors"], dict(B=2, Lq=600, Lk=600, left=20, right=3)),
    "dropout and biases": (["dropout", "bias of keys", "groups"], dict(B=2, H=2, Hk=1, Lq=530, Lk=400)),
    "bias of the batch": (["bias of the batch"], dict(B=3, H=2, Hk=1, Lq=530, Lk=400, right=0)),
    "bias of heads": (["bias of heads", "prefix"], dict(B=2, H=6, Hk=2, Lq=300, Lk=400)),
    "one bias": (["one bias", "ranks"], dict(B=3, H=4, Hk=2, Lq=530, Lk=200, left=300, key_lengths=torch.tensor([200, 70, 0]))),
    "vectors of a batch": (["query vectors", "value vectors"], dict(B=3, H=1, Hk=1, Lq=600, Lk=600, D=16, left=100, right=100)),
    "vectors of a ragged batch": (["key vectors"], dict(B=4, H=2, Hk=1, Lq=300, Lk=500, D=16, right=0, key_lengths=torch.tensor([0, 500, 90, 300]))),
    "vectors": (["query vectors", "key vectors and positions", "value vectors"], dict(B=2, H=4, Hk=2, Lq=520, Lk=200, D=16, right=0)),
    "all": (
        ["prefix", "ranks", "dropout", "bias", "query vectors and positions", "key vectors", "value vectors"],
        dict(H=2, Hk=1, Lq=300, Lk=330, right=0),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MANY_TERMS)
def test_cpp_bits_of_terms_do_not_depend_on_threads(name, dtype, threads):
    terms, sizes = MANY_TERMS[name]
    args = with_terms(arguments(dtype=dtype, offset=sizes.get("Lk") - sizes["Lq"], **sizes), terms)
    threads(1)
    alone = results(args)
    for n in (2, 3, 7):
        threads(n)
        for key, got in results(args).items():
            assert torch.equal(got, alone[key]), f"{key} differs with {n} threads"
    assert_attention_accurate(args)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory is read from Linux's /proc")
@pytest.mark.parametrize("terms", [["one bias"], ["bias of the batch"], ["bias of keys"], ["query vectors", "value vectors"]], ids=str)
def test_cpp_backward_keeps_one_sum(terms):
    """Beside results: sums of the gradients' own size and of dk and dv, and what the threads need; no copy of them for each row and head."""
    args = with_terms(arguments(B=16, H=8, Hk=8, Lq=512, Lk=512, D=32), terms)
    out, lse = attention(*args)
    call = lambda: attention_backward(draw(*out.shape, seed=4), None, out, lse, *args, [getattr(args, name) is not None for name in LEARNED])
    gradients = sum(x.nbytes for x in call())
    assert peak_growth(call) < 2 * gradients + args.k.nbytes + 2**22


def peak_growth(call) -> int:
    """Bytes by which resident memory grows during a call, at most, from where what was freed before has gone back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident()
    call()
    return resident()[1] - before


def resident() -> tuple[int, int]:
    """Resident memory in bytes, now and at its peak."""
    found = dict(re.findall(r"(VmRSS|VmHWM):\s*(\d+) kB", Path("/proc/self/status").read_text()))
    return 1024 * int(found["VmRSS"]), 1024 * int(found["VmHWM"])


def test_cpp_drops_what_the_definition_drops(isa):
    """With equal scores and the identity as values, the output is the mask."""
    B, H, Lq, Lk = 2, 3, 70, 66
    q, k, v = torch.zeros(B, H, Lq, Lk), torch.zeros(B, H, Lk, Lk), torch.eye(Lk).expand(B, H, -1, -1).contiguous()
    for dropout, seed in ((0.3, 2**63 - 5), (0.999, 7), (1e-12, 0)):
        out, _ = attention(*Arguments.of(q, k, v, dropout=dropout, seed=seed))
        assert torch.equal(out != 0, kept((B, H, Lq, Lk), dropout, seed, CPU))


def test_cpp_takes_a_bias_as_it_lies_and_wants_no_gradient_of_it():
    args = arguments(B=2)
    bias = draw(2, 1, 70, 70).mT
    torch.testing.assert_close(
        results(args._replace(bias=bias.expand(2, 2, 70, 70)))["out"], results(args._replace(bias=bias.contiguous()))["out"], rtol=0, atol=0
    )
    q = args.q.clone().requires_grad_()
    out, _ = attention(*args._replace(q=q, bias=bias))
    (got,) = torch.autograd.grad(out.sum(), q)
    assert got.isfinite().all() and bias.grad is None


def test_cpp_exponential(isa):
    """exp(x) for x ≤ 0 is exact at 0, off by at most 2⁻²³ + 1.25 · |x| · 2⁻²⁴ of itself, by less than 2⁻¹²⁶ where it is smaller than that."""
    bits = torch.arange(0, torch.tensor(1000.0).view(torch.int32).item(), 499, dtype=torch.int32)
    x = torch.cat((-bits.view(torch.float32), torch.tensor([-torch.inf, torch.nan, torch.finfo(torch.float32).min])))
    got = torch.full_like(x, torch.nan)
    native.cpu().attention_exp(x.data_ptr(), got.data_ptr(), x.numel())
    truth, least = x.double().exp(), torch.finfo(torch.float32).tiny
    allowed = torch.where(truth < least, least, truth * (2**-23 + 1.25 * x.double().abs() * 2**-24))
    assert got[0] == 1 and got[-2].isnan() and got[-1] == got[-3] == 0
    wrong = ((got.double() - truth).abs() > allowed)[:-3]
    assert not wrong.any(), f"exp({x[:-3][wrong][0].item()}) gave {got[:-3][wrong][0].item()}"


def test_cpp_reads_strided_tensors_in_place(isa):
    packed = draw(2, 33, 3, 4, 16)  # [B, L, 3, H, D], as a fused projection leaves it
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    assert native.side_by_side(q) is q
    strided, dense = results(Arguments.of(q, k, v, right=0)), results(Arguments.of(q.contiguous(), k.contiguous(), v.contiguous(), right=0))
    assert all(torch.equal(strided[name], dense[name]) for name in dense)
    across = packed.permute(0, 3, 4, 2, 1)[:, :, :, 0].mT.contiguous().mT.mT  # channels apart: the launcher's copy
    assert_attention_accurate(Arguments.of(across, across, across))


@pytest.mark.parametrize("sizes", [dict(Lk=0), dict(Lq=0), dict(B=0)], ids=str)
def test_cpp_empty(sizes):
    got = results(arguments(**sizes))
    assert all((x == 0).all() for name, x in got.items() if name != "lse") and (got["lse"] == -torch.inf).all()


def test_cpp_rows_that_see_nothing():
    args = arguments(B=3, key_lengths=torch.tensor([0, 5, -2], dtype=torch.int32), left=3, right=0)
    got = results(args)
    blind = torch.tensor([0, 2])
    assert all((got[name][blind] == 0).all() for name in ("out", "q", "k", "v")) and (got["lse"][blind] == -torch.inf).all()
    assert (got["out"][1, :, 8:] == 0).all() and (got["k"][1, :, 5:] == 0).all() and (got["q"][1, :, :8] != 0).any()
    assert_attention_accurate(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_huge_logits(dtype, isa):
    args = arguments(Lq=130, Lk=130, dtype=dtype, right=0)
    assert_attention_accurate(args._replace(q=100 * args.q, table=100 * args.table))


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
def test_cpp_masks_inside_the_table(hidden, isa):
    """-inf hides; the least float is a bias like another: a row full of it is a softmax of equals."""
    args = arguments(H=2, Lq=70, Lk=70)
    table = args.table.clone()
    table[0], table[1, 60:] = hidden, hidden
    got, score = results(args._replace(table=table)), scores(args._replace(table=table), torch.float32)
    torch.testing.assert_close(got["out"], score.softmax(-1).nan_to_num(0.0) @ args.v)
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("terms", [[], *([name] for name in (*MASKS, "bias of keys", "groups", "query vectors", "key vectors"))], ids=str)
def test_cpp_hidden_pairs_may_hold_anything(terms, value, isa):
    args = with_terms(arguments(B=2, Lq=140, Lk=140, right=0), terms)
    args.k[:, 1, 100] = value
    out, lse = attention(*args)
    expected, expected_lse = attention.definition(*args)
    assert expected[:, 1, 20:90].isfinite().all() and not expected[:, 1].isfinite().all()
    seen = expected.isfinite()
    assert torch.equal(out.isfinite(), seen)
    torch.testing.assert_close(out[seen], expected[seen])
    torch.testing.assert_close(lse[seen[..., 0]], expected_lse[seen[..., 0]])


def gradients_from_stored_output(args: Arguments, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """In fp64 but for δ = ⟨grad, out⟩ of out as it is stored: beside the truth, what every flash attention pays for that."""
    a = args._replace(**{name: x.detach() for name, x in leaves_of(args, torch.float64).items()})
    out, lse = attention.definition(*a)
    grads = attention_backward.definition(
        grad.double(), None, out.to(grad.dtype).double(), lse, *a, [getattr(a, name) is not None for name in LEARNED]
    )
    return {name: x for name, x in zip(LEARNED, grads, strict=True) if getattr(a, name) is not None}


shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "Hk": st.integers(1, 2),
        "group": st.integers(1, 3),
        "Lq": st.integers(1, 150),
        "Lk": st.integers(1, 150),
        "D": st.integers(1, 40),
    }
)
bound = st.one_of(st.just(UNBOUNDED), st.integers(0, 100))


@settings(max_examples=60, deadline=None)
@given(
    shapes, st.sampled_from(native.cpu().available()), st.sampled_from(DTYPES), bound, bound, st.integers(-60, 60), st.booleans(),
    st.lists(st.integers(0, 160), min_size=2, max_size=2), st.booleans(), st.lists(st.sampled_from(TERMS), max_size=4, unique=True),
)  # fmt: skip
def test_cpp_agrees_on_drawn_shapes(shape, name, dtype, left, right, offset, table, lengths, transpose, terms):
    before, (B, Hk, group) = native.cpu().active(), (shape.pop(n) for n in ("B", "Hk", "group"))
    args = arguments(
        B, Hk * group, Hk, dtype=dtype, table=table, left=left, right=right, offset=offset, key_lengths=torch.tensor(lengths[:B]), **shape
    )
    if transpose:
        args = args._replace(**{n: getattr(args, n).transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v")})
    args = with_terms(args, terms)
    native.cpu().use(name)
    try:
        got = results(args)
    finally:
        native.cpu().use(before)
    grad = draw(*args.q.shape, dtype=dtype, seed=4)
    truth, stored = attention_truth(args, grad), gradients_from_stored_output(args, grad)
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for key in got:
        size = 1 + truth[key].nan_to_num(neginf=0.0).abs().max().item()
        storing = (stored[key] - truth[key]).abs().max().item() if key in stored else 0.0
        torch.testing.assert_close(got[key].double(), truth[key], rtol=0, atol=close * size + 2 * storing, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(dtype=torch.float64), "query is torch.float64; served are fp32, bf16 and fp16"),
        (dict(D=257), "the head dimension is 257; served are 1 to 256"),
        (dict(left=-2, right=1), "is empty"),
        (dict(bias=torch.zeros(1, 1, 1, 70, dtype=torch.float64)), "bias is torch.float64"),
        (dict(dtype=torch.bfloat16, query_vectors=torch.zeros(2, 139, 32), q_position=torch.zeros(1, 2, 70, 32)), "q_position is torch.float32"),
    ],
)
def test_what_it_does_not_take_is_refused(changes, reason):
    with pytest.raises(BackendError, match=reason):
        attention(*arguments(**changes))


def launch(**changes):
    view = (64, (1, 2, 3, 8), (48, 24, 8, 1))
    given = (
        dict(q=view, k=view, v=view, dtype=0, table=0, lengths=0, terms={}, dropout=(0.0, 0, 0), band=(0, 0, 0), scale=1.0, out=64, lse=64) | changes
    )
    native.cpu().attention(*given.values(), 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=(0, (1, 2, 3, 8), (48, 24, 8, 1))), "q is a null address"),
        (dict(v=(64, (1, 2, 4, 8), (64, 32, 8, 1))), "v does not have the shape"),
        (dict(k=(64, (1, 2, 3, 8), (48, 24, 8, 2))), "the last stride is 2"),
        (dict(q=(64, (1, 2, -3, 8), (48, 24, 8, 1))), "a size is negative"),
        (dict(q=(64, (3, 8), (8, 1))), "four dimensions"),
        (dict(q=(64, (1, 3, 3, 8), (72, 24, 8, 1))), "multiple of key heads"),
        (dict(q=(64, (1, 2, 3, 300), (1800, 900, 300, 1))), "head dimension is 300"),
        (dict(dtype=3), "dtype must be"),
        (dict(out=0), "out and lse must be given"),
        (dict(band=(-2, 1, 0)), "band is empty"),
        (dict(dropout=(1.0, 0, 0)), "dropout is 1.0"),
        (dict(terms={"prefix": ((64, (2,), (1,)), -1)}), "prefix does not have the shape"),
        (dict(terms={"q_ranks": ((64, (1, 3), (3, 1)), -1)}), "ranks must be given for queries and keys"),
        (dict(terms={"bias": ((64, (1, 2, 2, 3), (12, 6, 3, 1)), 0)}), "bias does not broadcast"),
        (dict(terms={"query_vectors": ((64, (2, 6, 8), (48, 8, 1)), 0)}), "query_vectors must be"),
    ],
)
def test_launcher_checks_what_it_is_given(changes, message):
    with pytest.raises(ValueError, match=message):
        launch(**changes)


def test_cpp_gradient_of_lse(isa):
    args = arguments(right=0, return_lse=True)
    grad, grad_lse = draw(*args.q.shape, seed=4), draw(*args.q.shape[:3], seed=5)
    leaves, wide = leaves_of(args), leaves_of(args, torch.float64)
    got = torch.autograd.grad(attention(*args._replace(**leaves)), list(leaves.values()), (grad, grad_lse))
    truth = torch.autograd.grad(attention.definition(*args._replace(**wide)), list(wide.values()), (grad.double(), grad_lse.double()))
    for x, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)

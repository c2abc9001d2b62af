"""Attention in C++: every instruction set by the tolerance rule, what hidden pairs may hold, and what it does not take.

Results start as NaN here (conftest.py: poisoned_cpp), so an element nobody wrote shows.
"""

import pytest
import torch
from cases import ATTENTION
from chosen import MASKS, TERMS, arguments, draw, results, with_terms
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_attention_accurate, assert_case_accurate, attention_truth, leaves_of

from fastlm.backends import native
from fastlm.backends.dispatch import BackendError
from fastlm.backends.philox import dropout_mask
from fastlm.masks import UNBOUNDED
from fastlm.ops.attention import LEARNED, Arguments, attention, attention_backward, scores

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if native.cpp_missing(CPU):
    pytest.skip(native.cpp_missing(CPU), allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned_cpp")


@pytest.fixture(params=native.cpu().available())
def isa(request):
    before = native.cpu().active()
    native.cpu().use(request.param)
    yield request.param
    native.cpu().use(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_cpp_is_accurate(case, dtype, isa):
    assert_case_accurate(case, dtype, CPU)


def test_cpp_drops_what_the_definition_drops(isa):
    """With equal scores and the identity as values, the output is the mask."""
    B, H, Lq, Lk = 2, 3, 70, 66
    q, k, v = torch.zeros(B, H, Lq, Lk), torch.zeros(B, H, Lk, Lk), torch.eye(Lk).expand(B, H, -1, -1).contiguous()
    for dropout, seed in ((0.3, 2**63 - 5), (0.999, 7), (1e-12, 0)):
        out, _ = attention(Arguments.of(q, k, v, dropout=dropout, seed=seed))
        assert torch.equal(out != 0, dropout_mask((B, H, Lq, Lk), dropout, seed, CPU))


def test_cpp_takes_a_bias_as_it_lies_and_wants_no_gradient_of_it():
    args = arguments(B=2)
    bias = draw(2, 1, 70, 70).mT
    torch.testing.assert_close(
        results(args._replace(bias=bias.expand(2, 2, 70, 70)))["out"],
        results(args._replace(bias=bias.contiguous()))["out"],
        rtol=0,
        atol=0,
    )
    q = args.q.clone().requires_grad_()
    out, _ = attention(args._replace(q=q, bias=bias))
    (got,) = torch.autograd.grad(out.sum(), q)
    assert got.isfinite().all() and bias.grad is None


def test_cpp_exponential(isa):
    """exp(x) for x ≤ 0 is exact at 0, off by at most 2⁻²³ + 1.25 · |x| · 2⁻²⁴ of itself, by less than 2⁻¹²⁶ where it is
    smaller than that.
    """
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
    strided, dense = (
        results(Arguments.of(q, k, v, right=0)),
        results(Arguments.of(q.contiguous(), k.contiguous(), v.contiguous(), right=0)),
    )
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
    assert (
        all((got[name][blind] == 0).all() for name in ("out", "q", "k", "v"))
        and (got["lse"][blind] == -torch.inf).all()
    )
    assert (got["out"][1, :, 8:] == 0).all() and (got["k"][1, :, 5:] == 0).all() and (got["q"][1, :, :8] != 0).any()
    assert_attention_accurate(args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("D", [5, 37, 64, 80])
def test_cpp_rows_that_see_one_key(D, dtype, isa):
    """Their probability is 1 whatever the score: its gradients are zero to the bit, for both sides of the difference
    that gives them are summed in one order.
    """
    got = results(arguments(D=D, dtype=dtype, left=0, right=0))
    assert not any(got[name].any() for name in ("q", "k", "table"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_huge_logits(dtype, isa):
    """Gradients come from lse, whose last digit grows with the logits: up to some 64 ulps more than PyTorch's, which
    keeps P.
    """
    args = arguments(Lq=130, Lk=130, dtype=dtype, right=0)
    assert_attention_accurate(args._replace(q=100 * args.q, table=100 * args.table), ulps=64)


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
@pytest.mark.parametrize(
    "terms",
    [
        [],
        *([name] for name in (*MASKS, "softcap", "bias of keys", "groups", "query vectors", "key vectors")),
        ["softcap", "ranks", "query vectors", "key vectors"],
    ],
    ids=str,
)
def test_cpp_hidden_pairs_may_hold_anything(terms, value, isa):
    args = with_terms(arguments(B=2, Lq=140, Lk=140, right=0), terms)
    args.k[:, 1, 100] = value
    out, lse = attention(args)
    expected, expected_lse = attention.definition(args)
    assert expected[:, 1, 20:90].isfinite().all() and not expected[:, 1].isfinite().all()
    seen = expected.isfinite()
    assert torch.equal(out.isfinite(), seen)
    torch.testing.assert_close(out[seen], expected[seen])
    torch.testing.assert_close(lse[seen[..., 0]], expected_lse[seen[..., 0]])


def gradients_from_stored_output(args: Arguments, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """In fp64 but for δ = ⟨grad, out⟩ of out as it is stored: beside the truth, what every flash attention pays for
    that.
    """
    a = args._replace(**{name: x.detach() for name, x in leaves_of(args, torch.float64).items()})
    out, lse = attention.definition(a)
    grads = attention_backward.definition(
        grad.double(), None, out.to(grad.dtype).double(), lse, a, [getattr(a, name) is not None for name in LEARNED]
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
    shapes, st.sampled_from(native.cpu().available()), st.sampled_from(DTYPES), bound, bound, st.integers(-60, 60),
    st.booleans(),
    st.lists(st.integers(0, 160), min_size=2, max_size=2), st.booleans(),
    st.lists(st.sampled_from(TERMS), max_size=4, unique=True),
)  # fmt: skip
def test_cpp_agrees_on_drawn_shapes(shape, name, dtype, left, right, offset, table, lengths, transpose, terms):
    before, (B, Hk, group) = native.cpu().active(), (shape.pop(n) for n in ("B", "Hk", "group"))
    args = arguments(
        B,
        Hk * group,
        Hk,
        dtype=dtype,
        table=table,
        left=left,
        right=right,
        offset=offset,
        key_lengths=torch.tensor(lengths[:B]),
        **shape,
    )
    if transpose:
        args = args._replace(
            **{n: getattr(args, n).transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v")}
        )
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
        torch.testing.assert_close(
            got[key].double(),
            truth[key],
            rtol=0,
            atol=close * size + 2 * storing,
            msg=lambda text, key=key: f"{key}: {text}",
        )


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(dtype=torch.float64), "query is torch.float64; served are fp32, bf16 and fp16"),
        (dict(D=257), "the head dimension is 257; served are 1 to 256"),
        (dict(left=-2, right=1), "is empty"),
        (dict(softcap=0.0), "softcap is 0.0; served are positive numbers that fp32 holds"),
        (dict(softcap=1e39), "softcap is 1e\\+39; served"),
        (
            dict(dtype=torch.bfloat16, query_vectors=torch.zeros(2, 139, 32), q_position=torch.zeros(1, 2, 70, 32)),
            "q_position is torch.float32",
        ),
    ],
)
def test_what_it_does_not_take_is_refused(changes, reason):
    with pytest.raises(BackendError, match=reason):
        attention(arguments(**changes))


KEPT: list[torch.Tensor] = []  # whose addresses are given


def launch(**changes):
    view = (64, (1, 2, 3, 8), (48, 24, 8, 1))
    given = (
        dict(
            q=view,
            k=view,
            v=view,
            dtype=0,
            table=0,
            lengths=0,
            terms={},
            dropout=(0.0, 0, 0, 0, 0),
            band=(0, 0, 0),
            scale=1.0,
            softcap=0.0,
            out=64,
            lse=64,
        )
        | changes
    )
    native.cpu().attention(*given.values(), 1)


def in_buckets(*numbers: int) -> dict:
    """Vectors of three buckets, and which of them distances have."""
    KEPT.append(torch.tensor(numbers))
    vectors = ((64, (2, 3, 8), (24, 8, 1)), 0)
    return dict(terms={"query_vectors": vectors, "buckets": (native.view(KEPT[-1]), -1)})


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
        (dict(dropout=(1.0, 0, 0, 0, 0)), "dropout is 1.0"),
        (dict(softcap=-1.0), "softcap is -1.0+; give a positive number that fp32 holds, or 0 for none"),
        (dict(softcap=float("nan")), "softcap is nan"),
        (dict(terms={"prefix": ((64, (2,), (1,)), -1)}), "prefix does not have the shape"),
        (dict(terms={"q_ranks": ((64, (1, 3), (3, 1)), -1)}), "ranks must be given for queries and keys"),
        (dict(terms={"bias": ((64, (1, 2, 2, 3), (12, 6, 3, 1)), 0)}), "bias does not broadcast"),
        (dict(terms={"query_vectors": ((64, (2, 6, 8), (48, 8, 1)), 0)}), "query_vectors must be"),
        (in_buckets(0, 1, 1, 3, 3), "must begin with 0 and rise by 0 or 1"),
        (in_buckets(1, 1, 1, 1, 1), "must begin with 0 and rise by 0 or 1"),
        (in_buckets(0, 1, 1, 0, 0), "must begin with 0 and rise by 0 or 1"),
        (in_buckets(0, 1, 1, 2, 3), r"query_vectors must be .* \[H, buckets, D\]"),
        (in_buckets(0, 1, 1, 2), "buckets does not have the shape"),
    ],
)
def test_launcher_checks_what_it_is_given(changes, message):
    with pytest.raises(ValueError, match=message):
        launch(**changes)


def test_cpp_gradient_of_lse(isa):
    args = arguments(right=0, return_lse=True)
    grad, grad_lse = draw(*args.q.shape, seed=4), draw(*args.q.shape[:3], seed=5)
    leaves, wide = leaves_of(args), leaves_of(args, torch.float64)
    got = torch.autograd.grad(attention(args._replace(**leaves)), list(leaves.values()), (grad, grad_lse))
    truth = torch.autograd.grad(
        attention.definition(args._replace(**wide)), list(wide.values()), (grad.double(), grad_lse.double())
    )
    for x, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)

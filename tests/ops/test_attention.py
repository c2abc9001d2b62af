"""fastlm.attention: the definition against plain PyTorch, what masks and positions mean, and errors that name the
cure.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import ATTENTION, ROTATE
from chosen import in_buckets
from tolerance import assert_case_accurate, assert_far_scores_are_a_softmax, leaves_of

import fastlm
from fastlm import positions
from fastlm.backends import native
from fastlm.backends.philox import dropout_mask
from fastlm.ops.attention import LEARNED, VECTORS, Arguments, attention, attention_backward
from fastlm.ops.attention_backends import without_buckets
from fastlm.ops.rotary import rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_definition_is_accurate(case, dtype):
    with fastlm.use_backend("reference"):
        assert_case_accurate(case, dtype, CPU)


def random_arguments(**changes) -> Arguments:
    """Every term and every mask at once, small, in fp64."""
    B, H, Hk, Lq, Lk, D = 2, 4, 2, 5, 7, 3
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    ints = lambda high, *shape: torch.randint(high, shape, generator=g)
    n = Lq + Lk - 1
    return Arguments(
        q=draw(B, H, Lq, D), k=draw(B, Hk, Lk, D), v=draw(B, Hk, Lk, D), table=draw(H, n), bias=draw(1, H, 1, Lk),
        q_position=draw(B, H, Lq, D), query_vectors=draw(H, n, D), k_position=draw(B, Hk, Lk, D),
        key_vectors=draw(H, n, D),
        value_vectors=draw(H, n, D), buckets=None,
        same=draw(B, H, Lq), q_groups=ints(2, B, Lq), k_groups=ints(2, B, Lk),
        key_lengths=torch.tensor([7, 6]), prefix=torch.tensor([3, 0]), q_segments=ints(2, B, Lq),
        k_segments=ints(2, B, Lk),
        q_ranks=ints(9, B, Lq), k_ranks=ints(6, B, Lk), left=4, right=1, scale=0.4, offset=2, dropout=0.3, seed=5,
        return_lse=True,
    )._replace(**changes)  # fmt: skip


@pytest.mark.parametrize(
    "changes, shared",
    [({}, False), (dict(q_position=None, k_position=None), False), ({}, True), (dict(softcap=0.9), False)],
    ids=["apart", "queries_and_keys_themselves", "buckets", "softcap"],
)
def test_gradients_against_finite_differences(changes, shared):
    args = random_arguments(**changes)
    args = in_buckets(args, torch.Generator().manual_seed(0)) if shared else args
    leaves = leaves_of(args)

    def call(*tensors):
        out, lse = attention(args._replace(**dict(zip(leaves, tensors, strict=True))))
        return out, lse.clamp(min=-1e3)  # a difference of infinities is no number

    with fastlm.use_backend("reference"):
        assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("softcap", [None, 0.9])
def test_the_whole_formula_against_einsum(softcap):
    """The op's formula again, written over a dense [Lq, Lk] grid of distances."""
    a = random_arguments(dropout=0.0, softcap=softcap)
    i, j = torch.arange(5)[:, None], torch.arange(7)
    d = j - i + 4
    k, v, k_position = (x.repeat_interleave(2, 1) for x in (a.k, a.v, a.k_position))
    score = torch.einsum("bhid,bhjd->bhij", a.q, k)
    score = score + torch.einsum("bhid,hijd->bhij", a.q_position, a.query_vectors[:, d])
    score = score + torch.einsum("bhjd,hijd->bhij", k_position, a.key_vectors[:, d])
    score = a.scale * score if softcap is None else softcap * torch.tanh(a.scale * score / softcap)
    score = score + a.table[:, d] + a.bias
    score = score + a.same[..., None] * (a.q_groups[:, None, :, None] == a.k_groups[:, None, None])
    band = ((j - i - a.offset >= -a.left) & (j - i - a.offset <= a.right)) | (j < a.prefix[:, None, None, None])
    visible = (
        band
        & (j < a.key_lengths[:, None, None, None])
        & (a.q_segments[:, None, :, None] == a.k_segments[:, None, None])
    )
    visible = visible & (a.k_ranks[:, None, None] <= a.q_ranks[:, None, :, None])
    p = score.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("bhij,bhjd->bhid", p, v) + torch.einsum("bhij,hijd->bhid", p, a.value_vectors[:, d])
    with fastlm.use_backend("reference"):
        torch.testing.assert_close(attention(a)[0], expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_softcap_is_flex_attention_s(backend):
    """Whose score_mod bounds scores first and then adds ALiBi; and the bound shows."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (3 * torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    alibi = positions.ALiBi(2)
    table = alibi.bias(torch.arange(-39, 40))

    def tanh_softcap(score, b, h, q_idx, kv_idx):
        score = 2.5 * torch.tanh(score / 2.5) + table[h, kv_idx - q_idx + 39]
        return torch.where(kv_idx <= q_idx, score, -torch.inf)

    with torch.no_grad():
        expected = flex_attention(q, k, v, score_mod=tanh_softcap)
    got = fastlm.attention(q, k, v, position=alibi, causal=True, softcap=2.5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (fastlm.attention(q, k, v, position=alibi, causal=True) - expected).abs().max() > 0.1


def test_a_softcap_that_bounds_nothing_or_everything(backend):
    q, k, v = (torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    got = fastlm.attention(q, k, v, causal=True, softcap=1e30)
    torch.testing.assert_close(got, fastlm.attention(q, k, v, causal=True))
    leaves = [(1e18 * x).requires_grad_() for x in (q, k)]
    got = fastlm.attention(*leaves, v, softcap=2)
    torch.testing.assert_close(got, (2 * (q @ k.mT).sign()).softmax(-1) @ v)
    assert not any(grad.any() for grad in torch.autograd.grad(got.sum(), leaves))


def test_only_wanted_gradients_are_made():
    case = next(c for c in ATTENTION if c.name == "odd")
    args = case.make(torch.float32, CPU)
    with fastlm.use_backend("reference"):
        out, lse = attention(args)
        grads = attention_backward(out, None, out, lse, args, [name == "k" for name in LEARNED])
    assert [g.numel() > 0 for g in grads] == [name == "k" for name in LEARNED]


def test_lse_and_its_gradient():
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    _out, lse = fastlm.attention(q, k, v, return_lse=True)
    expected = (q @ k.mT / 8**0.5).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    mine = torch.autograd.grad(lse.square().sum(), (q, k))
    for a, b in zip(mine, torch.autograd.grad(expected.square().sum(), (q, k)), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_a_function_of_the_seed():
    q = torch.randn(2, 2, 50, 8)
    draw = lambda seed: fastlm.attention(q, q, q, dropout=0.3, seed=seed)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    ones = torch.ones(1, 1, 500, 8)
    assert abs(fastlm.attention(ones, ones, ones, dropout=0.3, seed=0).mean() - 1) < 0.01
    torch.manual_seed(0)
    first = fastlm.attention(q, q, q, dropout=0.3)
    torch.manual_seed(0)
    assert torch.equal(first, fastlm.attention(q, q, q, dropout=0.3))


@pytest.mark.parametrize("name", ["reference", "cpp", "triton"])
def test_a_block_drops_what_the_whole_call_drops_there(name):
    if name != "reference" and getattr(native, f"{name}_missing")(CPU):
        pytest.skip(getattr(native, f"{name}_missing")(CPU))
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 2, 90, 80, generator=g).unbind(0)
    whole = dropout_mask((2, 2, 190, 180), 0.4, 2**40, CPU)
    eye = torch.eye(80).expand(2, 2, 80, 80).contiguous()
    for i, j in ((0, 0), (37, 12), (100, 100), (3, 99)):
        a = Arguments.of(q, k[:, :, :80], eye, dropout=0.4, seed=2**40, first_query=i, first_key=j)
        with fastlm.use_backend(attention=name):
            if name == "triton" and j % 4:
                with pytest.raises(fastlm.BackendError, match="counts keys from 99 on; served are multiples of 4"):
                    attention(a)
                continue
            kept = attention(a)[0] > 0
        assert torch.equal(kept, whole[:, :, i : i + 90, j : j + 80])


@pytest.mark.parametrize("case", [case for case in ATTENTION if "dropout" not in case.name], ids=str)
def test_gradients_add_up_over_blocks_of_keys(case):
    """Of out and lse of all keys, by the definition, each gradient is the sum of what some keys and the others give."""
    a = case.make(torch.float64, CPU)
    at = max(1, a.k.shape[2] // 3)
    out, lse = attention.definition(a)
    grad, grad_lse = (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double() for x in (out, lse))
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0.0)
    needs = [getattr(a, name) is not None for name in LEARNED]
    wanted = attention_backward.definition(grad, grad_lse, out, lse, a, needs)
    parts = [_keys(a, 0, at), _keys(a, at, a.k.shape[2])]
    found = [attention_backward.definition(grad, grad_lse, out, lse, part, needs) for part in parts if part.k.numel()]
    for name, whole, *some in zip(LEARNED, wanted, *found, strict=True):
        if name in ("q", "q_position", "same"):
            torch.testing.assert_close(sum(some), whole)
        elif name in ("k", "v") and whole.numel():
            torch.testing.assert_close(torch.cat(some, 2), whole)


def _keys(a, begin, end):
    """The call of the keys begin … end - 1 alone."""
    n = a.q.shape[2] + end - begin - 1
    of_keys = {name: x[:, :, begin:end] for name in ("k", "v", "k_position") if (x := getattr(a, name)) is not None}
    numbers = ("k_segments", "k_ranks", "k_groups")
    of_keys |= {name: x[:, begin:end] for name in numbers if (x := getattr(a, name)) is not None}
    if a.bias is not None and a.bias.shape[-1] > 1:
        of_keys["bias"] = a.bias[..., begin:end]
    ends = ("key_lengths", "prefix")
    until = {name: (x - begin).clamp(min=0) for name in ends if (x := getattr(a, name)) is not None}
    a = without_buckets(a)
    rows = {name: x[:, begin : begin + n] for name in ("table", *VECTORS) if (x := getattr(a, name)) is not None}
    return a._replace(offset=a.offset - begin, **of_keys, **until, **rows)


def test_masks_against_a_dense_mask():
    q, k, v = (torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    i, j = torch.arange(12)[:, None], torch.arange(12)
    for options, visible in (
        (dict(causal=True), j <= i),
        (dict(window=3), (i - j).abs() <= 3),
        (dict(window=(2, None)), j >= i - 2),
        (dict(causal=True, window=(4, 4)), (j <= i) & (j >= i - 4)),
        (dict(key_lengths=torch.tensor([5, 12])), (j < torch.tensor([5, 12])[:, None, None, None])),
        (dict(causal=True, offset=-3), j <= i - 3),
        (dict(causal=True, prefix=torch.tensor([0, 5])), (j <= i) | (j < torch.tensor([0, 5])[:, None, None, None])),
    ):
        with fastlm.use_backend("reference"):
            got = fastlm.attention(q, k, v, **options)
        bias = torch.zeros(2, 1, 12, 12).masked_fill(~visible.expand(2, 1, 12, 12), -torch.inf)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=bias).nan_to_num(0.0))


def test_rows_that_see_nothing_give_zeros_and_zero_gradients():
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    position = positions.T5Bias(2, causal=False)
    with fastlm.use_backend("reference"):
        out = fastlm.attention(q, k, v, position=position, key_lengths=torch.tensor([0, 6]))
        out.sum().backward()
    assert out[0].abs().max() == 0 and out[1].abs().max() > 0
    for t in (q, k, v):
        assert t.grad[0].abs().max() == 0 and t.grad.isfinite().all()
    assert position.weight.grad.isfinite().all()


@pytest.mark.parametrize("Lq, Lk", [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(Lq, Lk):
    q, k, v = torch.randn(1, 2, Lq, 8), torch.randn(1, 2, Lk, 8), torch.randn(1, 2, Lk, 8)
    out = fastlm.attention(q, k, v, causal=True)
    assert out.shape == q.shape and not out.any()


def test_padding_may_hold_anything():
    q, k, v = (torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    lengths = torch.tensor([4, 6])
    clean = fastlm.attention(q, k, v, key_lengths=lengths)
    k[0, :, 4:], v[0, :, 4:] = torch.nan, torch.inf
    for backend in ("reference", "cpp"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with fastlm.use_backend(backend):
            out = fastlm.attention(*leaves, key_lengths=lengths)
            torch.testing.assert_close(out, clean)
            out.sum().backward()
        assert all(t.grad.isfinite().all() for t in leaves)


def test_angles_may_be_learned():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    for layout in ("half", "interleaved"):
        for shape in ((5, 3), (2, 5, 3)):
            cos, sin = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
            with fastlm.use_backend("reference"):
                assert torch.autograd.gradcheck(lambda *a, layout=layout: rotate(*a, layout), (x, cos, sin))


def test_autocast_follows_torch():
    q = torch.randn(1, 2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlm.attention(*[q.double()] * 3).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlm.attention(q, q, q, causal=True).dtype == torch.bfloat16
        assert fastlm.attention(q, q, q, position=positions.ALiBi(2)).dtype == torch.bfloat16


def test_plain_attention_goes_to_torch():
    q = torch.randn(1, 2, 8, 16)
    assert attention.choose(Arguments.of(q, q, q, right=0)).name == "sdpa"
    assert attention.choose(Arguments.of(q, q, q, key_lengths=torch.tensor([3]))).name != "sdpa"
    assert attention.choose(Arguments.of(q, q, q, return_lse=True)).name != "sdpa"
    assert attention.choose(Arguments.of(q, q, q, softcap=50.0)).name != "sdpa"
    assert attention.choose(Arguments.of(q[:, :, :1], q, q, right=0, offset=7)).name == "sdpa"  # a step of decoding
    assert attention.choose(Arguments.of(q[:, :, :1], q, q, right=0, offset=6)).name != "sdpa"
    torch.testing.assert_close(
        fastlm.attention(q, q, q, causal=True)[:, :, 7:], fastlm.attention(q[:, :, 7:], q, q, causal=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_far_scores(dtype, backend):
    assert_far_scores_are_a_softmax(dtype, "cpu")


def test_lengths_and_offsets_without_end(backend):
    """Numbers that stand for "no limit" are not cut to 32 bits; offsets that reach the band's own are refused."""
    q = torch.randn(2, 2, 5, 16)
    got = fastlm.attention(q, q, q, key_lengths=torch.tensor([2**63 - 1, 2**31]))
    torch.testing.assert_close(got, fastlm.attention(q, q, q))
    with pytest.raises(ValueError, match="offset is 1073741824; it must be an int, and stay"):
        fastlm.attention(q, q, q, offset=2**30, causal=True)


def test_dropout_of_nearly_all_drops_all(backend):
    q = torch.randn(1, 1, 40, 16)
    assert not fastlm.attention(q, q, q, dropout=1 - 1e-12, seed=1).any()


def test_terms_in_other_dtypes_are_served(backend):
    """By every backend, their gradients in their own dtypes."""
    q = torch.randn(1, 2, 6, 16)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        bias = torch.randn(1, 2, 6, 6, dtype=dtype, requires_grad=True)
        out = fastlm.attention(q, q, q, bias=bias)
        torch.testing.assert_close(out, fastlm.attention(q, q, q, bias=bias.float()))
        out.sum().backward()
        assert bias.grad.dtype == dtype


def test_a_choice_for_attention_is_one_for_its_gradient():
    with fastlm.use_backend(attention="reference"):
        assert fastlm.backends.dispatch.forced_backend("attention_backward") == "reference"
        with fastlm.use_backend(attention_backward="cpp"):
            assert fastlm.backends.dispatch.forced_backend("attention_backward") == "cpp"
    with fastlm.use_backend(attention="sdpa"):
        assert fastlm.backends.dispatch.forced_backend("attention_backward") is None


def test_meta_tensors():
    q = torch.empty(1, 2, 6, 16, device="meta")
    assert fastlm.attention(q, q, q, causal=True).shape == q.shape


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=torch.zeros(1, 3, 4, 8)), "multiple of key heads|shape|value"),
        (dict(key=torch.zeros(1, 2, 4, 9)), r"got query \[1, 2, 4, 8\], key \[1, 2, 4, 9\]"),
        (dict(query=torch.zeros(1, 2, 4, 8, dtype=torch.int32)), "fp32, bf16, fp16"),
        (dict(key_lengths=torch.tensor([1.0])), r"key_lengths must be \[1\] integers"),
        (dict(prefix=torch.zeros(2, dtype=torch.long)), r"prefix must be \[1\] integers; got \[2\]"),
        (dict(segments=torch.zeros(1, 3, dtype=torch.long)), r"segments of queries must be \[1, 4\] integers"),
        (dict(order=(None, torch.zeros(1, 4, dtype=torch.long))), r"order must be a tuple of tensors"),
        (dict(bias=torch.zeros(1, 3, 4, 4)), r"bias must be \[B, H, Lq, Lk\] = \[1, 2, 4, 4\], each 1 to broadcast"),
        (dict(scale=0.0), "scale is 0.0; it must be a positive, finite number"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(seed=2**63, dropout=0.1), "seed is 9223372036854775808"),
        (
            dict(bias=torch.ones(1, 1, 4, 4, dtype=torch.bool)),
            r"bias is torch.bool, .* torch.where\(mask, 0.0, -torch.inf\)",
        ),
        (dict(window=(1, 2, 3)), r"window is \(1, 2, 3\); give \(left, right\)"),
        (dict(window=True), "window is True"),
        (dict(position="rope"), "position is 'rope'; give a scheme"),
        (
            dict(group_bias=(torch.zeros(4), *torch.zeros(2, 1, 4, dtype=torch.long))),
            r"\[B, H, Lq\] = \[1, 2, 4\] of floats; got \[4\]",
        ),
        (
            dict(position=positions.Terms(vectors=positions.Vectors(query_vectors=torch.zeros(2, 9, 8)))),
            r"query_vectors must be .* \[2, 7, 8\]",
        ),
        (
            dict(key_lengths=torch.zeros(1, dtype=torch.long, device="meta")),
            "key_lengths is on meta and query or x on cpu",
        ),
        (dict(window=-1), "window left bound is -1"),
        (dict(key_lengths=[4]), r"key_lengths is of type list; give a tensor, torch.as_tensor\(key_lengths\)"),
        (
            dict(key_lengths=torch.ones(1, dtype=torch.bool)),
            r"key_lengths must be \[1\] integers; got \[1\] torch.bool",
        ),
        (
            dict(order=torch.zeros(1, 4)),
            r"order must be a tuple of tensors \(ranks of queries, ranks of keys\); got Tensor",
        ),
        (
            dict(segments=(torch.zeros(1, 4, dtype=torch.long), None)),
            r"segments must be a tuple of tensors .* got \['Tensor', 'NoneType'\]",
        ),
        (
            dict(group_bias=torch.zeros(2, 1, 2, 4).unbind()),
            r"group_bias must be a tuple of tensors \(x, groups of queries, groups of keys\)",
        ),
        (
            dict(segments=(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long, device="meta"))),
            "segments is on meta",
        ),
        (dict(seed=torch.tensor(5)), r"seed is tensor\(5\); it must be an int"),
        (dict(seed=1.5), "seed is 1.5; it must be an int"),
        (dict(offset=1.0), "offset is 1.0; it must be an int"),
        (dict(scale=float("inf")), "scale is inf; it must be a positive, finite number"),
        (dict(softcap=0), "softcap is 0; it must be a positive, finite number"),
        (dict(softcap=-50.0), "softcap is -50.0; it must be a positive, finite number"),
        (dict(softcap=float("nan")), "softcap is nan; it must be a positive, finite number"),
        (dict(softcap="50"), "softcap is '50'; it must be a positive, finite number"),
        (dict(causal="no"), "causal is 'no'; give True or False"),
        (dict(position=positions.Sinusoidal(8)), "'sinusoidal' adds to token embeddings"),
        (dict(position=positions.ALiBi(3)), r"\[heads, Lq \+ Lk - 1\] = \[2, 7\]; got \[3, 7\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=message):
        fastlm.attention(**({"query": x, "key": x, "value": x} | change))


@pytest.mark.parametrize("backend", rotate.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ROTATE, ids=str)
def test_rotate(case, dtype, backend):
    x, cos, sin, layout = case.make(dtype, CPU)
    if backend == "triton":
        pytest.skip("tests/test_triton.py runs the Triton kernel")
    truth = rotate.definition(x.double(), cos, sin, layout)
    x.requires_grad_()
    with fastlm.use_backend(rotate=backend):
        out = rotate(x, cos, sin, layout)
        torch.testing.assert_close(out, truth.to(dtype))  # fp32 arithmetic, one rounding
        out.backward(out.detach())  # turning back gives x
    torch.testing.assert_close(
        x.grad, x.detach(), rtol=1e-6 if dtype == torch.float32 else 0.02, atol=1e-6 if dtype == torch.float32 else 0.02
    )


def test_rotate_takes_a_transposed_view():
    x = torch.randn(2, 9, 3, 16).transpose(1, 2)
    angles = torch.randn(9, 8)
    with fastlm.use_backend(rotate="reference"):
        expected = fastlm.rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(fastlm.rotate(x, angles.cos(), angles.sin()), expected)


def test_rotate_refuses_in_words():
    x, half = torch.zeros(1, 1, 4, 8), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="layout is 'diagonal'; choose from half, interleaved"):
        fastlm.rotate(x, half, half, layout="diagonal")
    with pytest.raises(ValueError, match="turn 16 channels, but x has 8"):
        fastlm.rotate(x, torch.zeros(4, 8), torch.zeros(4, 8))

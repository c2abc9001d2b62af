"""fastlm.attention: the definition against plain PyTorch, what masks and positions mean, and errors that name the cure."""

import pytest
import torch
import torch.nn.functional as F
from cases import ATTENTION, ROTATE
from tolerance import assert_attention_accurate

import fastlm
from fastlm import positions
from fastlm.ops.attention import attention, attention_backward
from fastlm.ops.rotary import rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_definition_is_accurate(case, dtype):
    with fastlm.use_backend("reference"):
        assert_attention_accurate(case.make(dtype, CPU))


@pytest.mark.parametrize("case", ATTENTION[:3] + ATTENTION[6:9], ids=str)
def test_op_is_a_proper_operator(case):
    q, k, v, table, *rest = case.make(torch.float32, CPU)
    leaves = [None if t is None else t.requires_grad_() for t in (q, k, v, table)]
    with fastlm.use_backend("reference"):
        torch.library.opcheck(attention.torch_op, (*leaves, *rest), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_gradients_against_finite_differences():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
    leaves = draw(2, 4, 5, 3), draw(2, 2, 7, 3), draw(2, 2, 7, 3), draw(4, 11)
    rest = torch.tensor([7, 0]), 3, 1, 0.4, 2
    with fastlm.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *a: attention(*a, *rest)[0], leaves)


def test_table_gradient_is_skipped_unless_asked():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    table = torch.randn(2, 15)
    with fastlm.use_backend("reference"):
        out, lse = attention(q, q, q, table, None, 99, 99, 1.0, 0)
        assert attention_backward(out, q, q, q, table, None, out, lse, 99, 99, 1.0, 0, False)[3].numel() == 0
        out.sum().backward()


@pytest.mark.parametrize("scheme", ["none", "rope", "alibi", "t5", "kerple"])
def test_last_query_sees_what_a_full_pass_sees(scheme):
    """Decoding: queries are the last ones, whatever the scheme, so a cached step equals the full forward."""
    q, k, v = (torch.randn(2, 4, 19, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    position = positions.make(scheme, dim=64, heads=4, head_dim=16, context=32, causal=True)
    full = fastlm.attention(q, k, v, position=position, causal=True)
    last = fastlm.attention(q[:, :, -3:], k, v, position=position, causal=True)
    torch.testing.assert_close(last, full[:, :, -3:])


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
    ):
        with fastlm.use_backend("reference"):
            got = fastlm.attention(q, k, v, **options)
        bias = torch.zeros(2, 1, 12, 12).masked_fill(~visible.expand(2, 1, 12, 12), -torch.inf)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=bias).nan_to_num(0.0))


def test_rows_that_see_nothing_give_zeros_and_zero_gradients():
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    position = positions.T5Bias(2)
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


def test_gradient_of_the_schemes_parameters():
    """dT by the op, the rest by autograd: against a dense bias built from the same parameters."""
    q, k, v = (torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for scheme in ("t5", "kerple"):
        ours = positions.make(scheme, heads=3, causal=False)
        distance = torch.arange(40) - torch.arange(40)[:, None]
        with fastlm.use_backend("reference"):
            fastlm.attention(q, k, v, position=ours).square().sum().backward()
        got = [p.grad.clone() for p in ours.parameters()]
        ours.zero_grad()
        dense = ours.bias(distance.flatten()).unflatten(-1, distance.shape)
        F.scaled_dot_product_attention(q, k, v, attn_mask=dense[None]).square().sum().backward()
        for mine, theirs in zip(got, ours.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.grad, rtol=1e-3, atol=1e-5)


def test_autocast_follows_torch():
    q = torch.randn(1, 2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlm.attention(q, q, q, causal=True).dtype == torch.bfloat16
        assert fastlm.attention(q, q, q, position=positions.ALiBi(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["alibi", "rope", "t5"])
def test_compiles_without_graph_breaks(scheme):
    position = positions.make(scheme, heads=2, head_dim=16, causal=True)
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    step = lambda q: fastlm.attention(q, q, q, position=position, causal=True).sum()
    torch.compile(step, fullgraph=True, backend="aot_eager")(q).backward()
    compiled, q.grad = q.grad, None
    step(q).backward()
    torch.testing.assert_close(compiled, q.grad)


def test_plain_attention_goes_to_torch():
    q = torch.randn(1, 2, 8, 16)
    infinite = fastlm.masks.UNBOUNDED
    assert attention.choose(q, q, q, None, None, infinite, 0, 1.0, 0).name == "sdpa"
    assert attention.choose(q, q, q, None, torch.tensor([3]), infinite, 0, 1.0, 0).name != "sdpa"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=torch.zeros(1, 3, 4, 8)), "multiple of key heads|shape|value"),
        (dict(key=torch.zeros(1, 2, 4, 9)), r"got query \[1, 2, 4, 8\], key \[1, 2, 4, 9\]"),
        (dict(query=torch.zeros(1, 2, 4, 8, dtype=torch.int32)), "fp32, bf16, fp16"),
        (dict(key_lengths=torch.tensor([1.0])), r"key_lengths must be \[1\] integers"),
        (dict(window=-1), "window left bound is -1"),
        (dict(position=positions.Sinusoidal(8)), "'sinusoidal' adds to token embeddings"),
        (dict(position=positions.ALiBi(3)), r"\[heads, Lq \+ Lk - 1\] = \[2, 7\]; got \[3, 7\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=message):
        fastlm.attention(**({"query": x, "key": x, "value": x} | change))


@pytest.mark.parametrize("name, value", [("bias", torch.zeros(1)), ("segments", torch.zeros(1)), ("dropout", 0.1), ("seed", 3)])
def test_what_is_not_served_says_so(name, value):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=f"does not serve {name}= yet"):
        fastlm.attention(x, x, x, **{name: value})


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
    torch.testing.assert_close(x.grad, x.detach(), rtol=1e-6 if dtype == torch.float32 else 0.02, atol=1e-6 if dtype == torch.float32 else 0.02)


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

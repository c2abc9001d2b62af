"""Triton's kernels: on the GPU if there is one, compiled; else in Triton's interpreter (tests/conftest.py says so)."""

from contextlib import nullcontext

import pytest
import torch
from cases import ATTENTION, COMBINED, ROTATE
from draws import arguments
from hypothesis import Phase, given, settings
from tolerance import (
    assert_attention_accurate,
    assert_case_accurate,
    assert_far_scores_are_a_softmax,
    assert_repeats,
    leaves_of,
    with_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.backends import native
from fastlm.ops.attention import INTEGERS, LEARNED, VECTORS, Arguments, attention, attention_backward
from fastlm.ops.rotary import rotate

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import interpreting

from fastlm.kernels import attention as forward_file
from fastlm.kernels import attention_backward as backward_file
from fastlm.kernels import bias_gradient, decoding, distance_gradients, launch
from fastlm.kernels.terms import UNSPECIALIZED, Numbers
from fastlm.kernels.tiles import Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILED = not native.interpreting()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture
def overflow_unchecked():
    """In the interpreter, for what takes long there; drawn cases and far offsets have every integer checked."""
    with nullcontext() if COMPILED else interpreting.overflow_unchecked():
        yield


NAMED = {case.name: case for case in ATTENTION}


def dtypes(i: int, case) -> tuple[torch.dtype, ...]:
    """Of the i-th case: all; in the interpreter fp32 and one of the others in turn, and for the largest one of the
    three in turn.
    """
    if COMPILED:
        return DTYPES
    q, k = case.make(torch.float32, DEVICE)[:2]
    return (DTYPES[i % 3],) if q.shape[:3].numel() * k.shape[2] > 80_000 else (torch.float32, DTYPES[1 + i % 2])


@pytest.mark.parametrize(
    "case, dtype", [(case, dtype) for i, case in enumerate(ATTENTION) for dtype in dtypes(i, case)], ids=str
)
@pytest.mark.usefixtures("overflow_unchecked")
def test_attention_is_accurate(case, dtype):
    with fastlm.use_backend("triton"):
        assert_case_accurate(case, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_scores(dtype):
    with fastlm.use_backend("triton"):
        assert_far_scores_are_a_softmax(dtype, DEVICE)


def test_lengths_without_end():
    q = torch.randn(2, 2, 5, 16, device=DEVICE)
    with fastlm.use_backend("triton"):
        got = fastlm.attention(q, q, q, key_lengths=torch.tensor([2**63 - 1, 2**31], device=DEVICE))
        assert not fastlm.attention(q, q, q, dropout=1 - 1e-12, seed=1).any()
    torch.testing.assert_close(got, fastlm.attention(q, q, q))


SMALL = {
    "forward": Tiles(16, 32, 4, 2), "forward_bias": Tiles(16, 32, 4, 2), "dq": Tiles(32, 16, 4, 2),
    "dkdv": Tiles(16, 32, 4, 2), "split": Tiles(64, 16, 4, 2),
    "table": Tiles(32, 16, 4, 2), "bias": Tiles(16, 32, 4, 1), "vectors": Tiles(16, 16, 4, 1),
    "vector_sums": Tiles(16, 16, 4, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "odd", "kerple_gqa", "lengths", "more_queries_than_keys", "offset", "shaw_causal_gqa", "transformer_xl",
        "xlnet", "deberta_gqa", "bias_full",
        "bias_keys", "bias_queries", "prefix", "packed", "packed_bidirectional", "order", "every_mask", "dropout_odd",
        "softcap_window_gqa", "softcap_bias_dropout", "softcap_deberta",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("overflow_unchecked")
def test_many_tiles(name, monkeypatch):
    """Tiles so small that a short sequence has full ones, edges on both sides, and several splits."""
    monkeypatch.setattr(launch, "tiles", lambda kernel, *_: SMALL[kernel])
    with fastlm.use_backend("triton"):
        assert_attention_accurate(NAMED[name].make(torch.float32, DEVICE))


def run(args: Arguments, seed: int = 0) -> dict[str, torch.Tensor]:
    leaves = leaves_of(args)
    out, _ = attention(args._replace(**leaves))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return with_gradients(out, leaves, grad)


@settings(
    max_examples=5 if COMPILED else 40, deadline=None, derandomize=True,
    phases=[Phase.generate] if COMPILED else list(Phase),
)  # fmt: skip
@given(arguments(longest=24, device=DEVICE))
def test_what_is_drawn_is_accurate(args):
    """Few where every draw has kernels to compile, and none that is made smaller when it fails."""
    with fastlm.use_backend("triton"):
        assert_attention_accurate(args, ulps=64)


TWICE = ("every_mask", "bias_keys", "softcap_bias_dropout")


@pytest.mark.usefixtures("overflow_unchecked")
@pytest.mark.parametrize("case", COMBINED if COMPILED else [NAMED[name] for name in TWICE], ids=str)
def test_the_same_bits_every_time(case):
    """Every term by every mask twenty times on a GPU; some of them twice in the interpreter, which runs one program
    after the other.
    """
    with fastlm.use_backend("triton"):
        assert_repeats(case.make(torch.bfloat16, DEVICE), 20 if COMPILED else 2)


class Allocations(TorchDispatchMode):
    """Counts the bytes of new tensors inside the block."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and not func.is_view and not any(x is a for a in args):
                self.bytes += x.untyped_storage().nbytes()
        return out


class Unlaunched:
    """A kernel that nobody runs: on the meta device a launcher allocates what it would, and there is nothing to
    compute.
    """

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


KERNELS = {
    forward_file: ["forward_kernel"], backward_file: ["dq_kernel", "dkdv_kernel"],
    distance_gradients: ["distances_kernel", "distances_sum_kernel"], bias_gradient: ["bias_kernel"],
    decoding: ["split_kernel", "merge_kernel"],
}  # fmt: skip
B, H, HK, D = 1, 12, 4, 64


def test_kernels_take_a_call_s_numbers_in_one_order():
    """The launchers' `*numbers(a)` lands where each kernel says, and what must not be compiled in is among them."""
    taking = [
        getattr(file, name)
        for file, names in KERNELS.items()
        for name in names
        if name not in ("distances_sum_kernel", "merge_kernel")
    ]
    assert len(taking) == 6
    for kernel in taking:
        at = kernel.arg_names.index(Numbers._fields[0])
        assert tuple(kernel.arg_names[at : at + len(Numbers._fields)]) == Numbers._fields, kernel
    assert set(UNSPECIALIZED) < set(Numbers._fields)


def long_arguments(L: int, *names: str) -> Arguments:
    """Half a gigabyte and more of attention, on paper."""
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")
    shapes = {
        "table": lambda: empty(H, 2 * L - 1, dtype=torch.float32), "bias": lambda: empty(B, 1, 1, L),
        "same": lambda: empty(B, H, L, dtype=torch.float32),
        "q_position": lambda: empty(B, H, L, D), "k_position": lambda: empty(B, HK, L, D),
        **dict.fromkeys(VECTORS, lambda: empty(H, 2 * L - 1, D)),
        **dict.fromkeys(INTEGERS, lambda: empty(B, L, dtype=torch.int64)),
        **dict.fromkeys(("key_lengths", "prefix"), lambda: empty(B, dtype=torch.int64)),
    }  # fmt: skip
    q, k, v = (empty(B, heads, L, D) for heads in (H, HK, HK))
    return Arguments.of(q, k, v, right=0, dropout=0.1, **{name: shapes[name]() for name in names})


SEGMENTS, RANKS, GROUPS = ("q_segments", "k_segments"), ("q_ranks", "k_ranks"), ("same", "q_groups", "k_groups")


@pytest.mark.parametrize(
    "names",
    [
        (), ("table",), ("table", "key_lengths", "prefix", *SEGMENTS, *RANKS), ("bias",),
        ("query_vectors", "value_vectors", *SEGMENTS),
        ("query_vectors", "q_position", *GROUPS, *RANKS), ("query_vectors", "key_vectors", "k_position", "prefix"),
    ],
    ids=", ".join,
)  # fmt: skip
def test_memory_grows_with_the_length_alone(names, monkeypatch):
    """Forward and backward at 131,072 positions: beyond inputs and results, at most a hundredth of what 16-bit [H, L,
    L] scores would take.
    """
    for file, kernels in KERNELS.items():
        for kernel in kernels:
            monkeypatch.setattr(file, kernel, Unlaunched())
    extra = {}
    for L in (65_536, 131_072):
        a = long_arguments(L, *names)
        with Allocations() as allocated:
            out, lse = forward_file.forward(a)
            made = backward_file.backward(
                out, None, out, lse, a, {name for name in LEARNED if getattr(a, name) is not None}
            )
        assert set(made) == {name for name in LEARNED if getattr(a, name) is not None}
        extra[L] = allocated.bytes - sum(x.numel() * x.element_size() for x in (out, lse, *made.values()))
    assert extra[131_072] <= 2.01 * extra[65_536]
    assert extra[131_072] <= 1e-2 * H * 131_072**2 * 2


def test_the_output_s_gradient_is_read_in_place(monkeypatch):
    """As modules give it, positions before heads: backward takes no more memory than for one without gaps."""
    for file, kernels in KERNELS.items():
        for kernel in kernels:
            monkeypatch.setattr(file, kernel, Unlaunched())
    a = long_arguments(64, "table", "bias")
    out, lse = forward_file.forward(a)
    taken = []
    for grad in (out, out.transpose(1, 2).contiguous().transpose(1, 2)):
        with Allocations() as allocated:
            backward_file.backward(grad, None, out, lse, a, {"q", "k", "v", "table", "bias"})
        taken.append(allocated.bytes)
    assert not grad.is_contiguous() and taken[0] == taken[1]


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other places: heads and positions exchanged, channels apart, inside a larger tensor."""
    apart = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    apart[..., ::2] = x
    inside = torch.zeros(*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 16, dtype=x.dtype, device=x.device)
    inside[:, :, 1:-2, 8:-8] = x
    return {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "apart": apart[..., ::2],
        "inside": inside[:, :, 1:-2, 8:-8],
    }


@pytest.mark.usefixtures("overflow_unchecked")
def test_strided_inputs():
    args = NAMED["odd"].make(torch.float32, DEVICE)
    needs_grad = [name in ("q", "k", "v", "table") for name in LEARNED]
    with fastlm.use_backend("triton"):
        out, lse = attention(args)
        expected = attention_backward(out, None, out, lse, args, needs_grad)
        for how, grad in strided(out).items():
            views = args._replace(**{name: strided(getattr(args, name))[how] for name in ("q", "k", "v")})
            got = [attention(views)[0], *attention_backward(grad, None, out, lse, views, needs_grad)]
            for a, b in zip(got, (out, *expected), strict=True):
                assert torch.equal(a, b), how


def test_offsets_beyond_32_bits():
    """Row 1 of the batch lies 2³¹ elements after row 0. The memory between them is reserved, never touched."""
    torch.use_deterministic_algorithms(False)
    far = 2**31
    memory = torch.empty(far + 1024, dtype=torch.float16, device=DEVICE)
    near = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    x = memory.as_strided(near.shape, (far, 512, 32, 1))
    x.copy_(near)
    angles = torch.ones(16, 16, device=DEVICE)
    with fastlm.use_backend("triton"):
        assert torch.equal(rotate(x, angles, angles, "half"), rotate(near, angles, angles, "half"))
        out, lse = attention(Arguments.of(near, near, near))
        assert torch.equal(attention(Arguments.of(x, x, x))[0], out)
        needs_grad = [name in ("q", "k", "v") for name in LEARNED]
        grads = [attention_backward(out, None, out, lse, Arguments.of(t, t, t), needs_grad)[:3] for t in (x, near)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_launch_is_known_by_all_that_kernels_are_compiled_for():
    """Another seed is the same launch; another dtype, length, stride, alignment, term or band is not."""
    q, table = torch.zeros(1, 2, 8, 16), torch.zeros(2, 15)
    far, unaligned = torch.zeros(1, 2, 8, 32)[..., :16], torch.zeros(257)[1:].view(1, 2, 8, 16)
    first = Arguments.of(q, q, q, dropout=0.1)
    known = launch.signature(first)
    hash(known)
    assert launch.signature(first._replace(q=torch.ones_like(q), seed=7)) == known
    changes = [
        dict(q=q.bfloat16()), dict(k=q[:, :, :4]), dict(q=far), dict(q=unaligned), dict(table=table), dict(right=0),
        dict(seed=2**40), dict(dropout=0.2), dict(softcap=50.0),
    ]  # fmt: skip
    assert all(launch.signature(first._replace(**change)) != known for change in changes)
    assert launch.signature(first, q) != launch.signature(first, far)


def test_rows_too_far_apart_for_32_bits_are_copied():
    reachable, far = (torch.empty_strided((1, 1, 3, 8), (0, 0, step, 1), device="meta") for step in (2**22 - 8, 2**22))
    assert launch.rows(reachable) is reachable and launch.rows(far).stride(2) == 8


@pytest.mark.parametrize("name", ["kerple_gqa", "lengths"])
def test_gradient_of_lse(name):
    args = NAMED[name].make(torch.float32, DEVICE)._replace(return_lse=True)
    grads = {}
    for backend in ("reference", "triton"):
        leaves = leaves_of(args)
        with fastlm.use_backend(backend):
            out, lse = attention(args._replace(**leaves))
            loss = out.square().sum() + torch.where(lse.isinf(), 0.0, lse).square().sum()
            grads[backend] = torch.autograd.grad(loss, list(leaves.values()))
    for got, expected in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients_are_made():
    args = NAMED["odd"].make(torch.float32, DEVICE)
    with fastlm.use_backend("triton"):
        out, lse = attention(args)
        grads = attention_backward(out, None, out, lse, args, [name == "k" for name in LEARNED])
    assert [g.numel() > 0 for g in grads] == [name == "k" for name in LEARNED]


@pytest.mark.parametrize("Lq, Lk", [(0, 5), (5, 0)])
def test_empty_sequences(Lq, Lk):
    draw = lambda L: torch.randn(1, 2, L, 16, device=DEVICE)
    table = torch.randn(2, Lq + Lk - 1, device=DEVICE)
    with fastlm.use_backend("triton"):
        got = run(Arguments.of(draw(Lq), draw(Lk), draw(Lk), table=table))
    assert got["table"].shape == table.shape
    assert not any(g.any() for g in got.values())


@pytest.mark.parametrize("left, right", [(0, 0), (-2, 5), (3, -1), (-3, 1)])
def test_narrow_bands(left, right):
    """Only the diagonal, only keys on one side, and a band that holds nothing."""
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    args = Arguments.of(*(draw(i, 1, 2, 40, 16) for i in range(3)), table=draw(3, 2, 79), left=left, right=right)
    results = []
    for backend in ("triton", "reference"):
        with fastlm.use_backend(backend):
            results.append(run(args))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scale=-1.0), "scale is -1.0; served are positive scales, so negate query"),
        (dict(q=torch.zeros(1, 1, 2, 257)), "the head dimension is 257; served are 1 to 256"),
        (
            dict(q=torch.zeros(1, 1, 2, 8, dtype=torch.float64)),
            "query is torch.float64; served are fp32, bf16 and fp16",
        ),
    ],
)
def test_refuses_in_words(change, message):
    x = torch.zeros(1, 1, 2, 8)
    with fastlm.use_backend("triton"), pytest.raises(fastlm.BackendError, match=message):
        args = Arguments.of(x, x, x)._replace(**change)
        attention(Arguments(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in args)))


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 2, 8)
    with (
        fastlm.use_backend("triton"),
        pytest.raises(fastlm.BackendError, match="Triton compiles for GPUs, and these tensors are on cpu"),
    ):
        attention(Arguments.of(x, x, x))


OPERATOR_TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")


def test_ops_are_proper_operators():
    args = NAMED["odd"].make(torch.float32, DEVICE)
    x, *angles, layout = ROTATE[0].make(torch.float32, DEVICE)
    with fastlm.use_backend("triton"):
        torch.library.opcheck(attention.torch_op, tuple(args._replace(**leaves_of(args))), test_utils=OPERATOR_TESTS)
        torch.library.opcheck(rotate.torch_op, (x.requires_grad_(), *angles, layout), test_utils=OPERATOR_TESTS)
        out, lse = attention(args)
        needs_grad = [name in ("q", "k", "v", "table") for name in LEARNED]
        torch.library.opcheck(
            attention_backward.torch_op, (out, None, out, lse, *args, needs_grad), test_utils=OPERATOR_TESTS[:2]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROTATE, ids=str)
def test_rotate(case, dtype):
    x, cos, sin, layout = case.make(dtype, DEVICE)
    truth = rotate.definition(x.double(), cos, sin, layout)
    x.requires_grad_()
    with fastlm.use_backend("triton"):
        out = rotate(x, cos, sin, layout)
        torch.testing.assert_close(out, truth.to(dtype))  # fp32 arithmetic, one rounding
        out.backward(out.detach())  # turning back gives x
        for view in strided(x.detach()).values() if dtype == torch.float32 else ():
            assert torch.equal(rotate(view, cos, sin, layout), out)
    loose = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(x.grad, x.detach(), rtol=loose, atol=loose)


def test_rotate_refuses_in_words():
    x, angles = torch.zeros(1, 1, 4, 8, dtype=torch.float64, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    with (
        fastlm.use_backend("triton"),
        pytest.raises(fastlm.BackendError, match=r"x is torch\.float64; served are fp32, bf16 and fp16"),
    ):
        rotate(x, angles, angles, "half")

"""The CUDA kernels of attention, compiled as C++ and run on the host: tensor cores, copies that go on beside them and
barriers in software, shared memory under watch (on_host/shared_memory.h).

What the host cannot show: how long anything takes, copies that really overtake one another, the memory model, and its
compiler's code. test_cuda_attention.py asks for numbers on a GPU, test_cuda_compile.py what the compiler made of it.
"""

import on_host
import pytest
import torch
from cases import ATTENTION, _attention
from tolerance import assert_attention_accurate, assert_case_accurate, assert_repeats

import fastlm
from fastlm.backends import native
from fastlm.backends.dispatch import BackendError
from fastlm.ops.attention import LEARNED, Arguments, attention

CPU = torch.device("cpu")
CUDA = next(backend for backend in attention.backends if backend.name == "cuda")
SERVED = [case for case in ATTENTION if CUDA.refuses(case.make(torch.bfloat16, CPU)) is None]
# every kind of walk and of gradient, over more than one tile either way
SMALL = _attention(B=1, H=2, Hk=1, Lq=70, Lk=100, scheme="kerple", causal=True, segments=True)(torch.float16, CPU)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return on_host.attention(tmp_path_factory.mktemp("on_host"))


@pytest.fixture
def use(monkeypatch):
    """use(module): attention by that module, on CPU tensors; results start as NaN."""
    monkeypatch.setattr(native, "cuda_missing", lambda device: None)
    monkeypatch.setattr(native, "cuda_stream", lambda device: (0, 0))
    torch.use_deterministic_algorithms(True, warn_only=True)
    view, address = native.view, native.address

    def by(module) -> None:
        watched = on_host.Watched(module)
        monkeypatch.setattr(native, "cuda", lambda: watched)
        monkeypatch.setattr(native, "view", lambda x: watched.give(x) or view(x))
        monkeypatch.setattr(native, "address", lambda x: watched.give(x) or address(x))

    with fastlm.use_backend(attention="cuda", attention_backward="cuda"):
        yield by
    torch.use_deterministic_algorithms(False)


def test_what_is_served():
    names = {case.name for case in SERVED}
    assert names >= {"t5_causal", "kerple_gqa", "mqa", "window", "offset", "prefix", "packed", "lengths", "d96", "d128"}


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_attention_is_accurate(built, use, case):
    """Forward and every gradient, in bf16 and fp16 in turn."""
    use(built)
    assert_case_accurate(case, (torch.bfloat16, torch.float16)[SERVED.index(case) % 2], CPU)


def test_no_two_lanes_meet_in_a_bank(built, use):
    use(built)
    conflicts = on_host.watch(built, "bank_conflicts")
    conflicts.value = 0
    for D in (64, 128):
        assert_attention_accurate(_attention(B=1, H=1, Hk=1, Lq=130, Lk=130, D=D, scheme="t5")(torch.bfloat16, CPU))
    assert conflicts.value == 0


def test_the_bits_repeat(built, use):
    """Whatever block comes first."""
    use(built)
    order = on_host.watch(built, "last_block_first")
    assert_repeats(SMALL, 10)
    out, lse = attention(SMALL)
    order.value = 1
    assert all(map(torch.equal, attention(SMALL), (out, lse)))
    assert_repeats(SMALL, 10)
    order.value = 0


def test_lse_has_a_gradient(built, use):
    use(built)
    q, k, v = (torch.randn(1, 2, 70, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))
    _out, lse = fastlm.attention(q, k, v, causal=True, return_lse=True)
    mine = torch.autograd.grad(lse.sum(), (q, k))
    with fastlm.use_backend("reference"):
        _out, expected = fastlm.attention(q.double(), k.double(), v.double(), causal=True, return_lse=True)
        truth = torch.autograd.grad(expected.sum(), (q, k))
    torch.testing.assert_close(lse.double(), expected, rtol=1e-3, atol=1e-3)
    for x, y in zip(mine, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=2e-3)


def test_padding_may_hold_anything(built, use):
    use(built)
    q, k, v = (torch.randn(2, 2, 70, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([40, 70])
    clean = fastlm.attention(q, k, v, key_lengths=lengths)
    with torch.no_grad():
        k[0, :, 40:], v[0, :, 40:] = torch.nan, torch.inf
    out = fastlm.attention(q, k, v, key_lengths=lengths)
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads) and not any(x[0, :, 40:].any() for x in grads[1:])


def test_tensors_as_models_have_them(built, use):
    """Heads beside channels, and rows that do not begin at multiples of 16 bytes."""
    use(built)
    qkv = torch.randn(1, 20, 3, 2, 16, dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    odd = torch.randn(2 * 20 * 16 + 1, dtype=torch.bfloat16)[1:].view(1, 2, 20, 16)
    for value in (v, odd):
        with fastlm.use_backend("reference"):
            expected = fastlm.attention(q, k, value, causal=True)
        torch.testing.assert_close(fastlm.attention(q, k, value, causal=True), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("B, Lq, Lk", [(1, 0, 5), (1, 5, 0), (0, 5, 5), (1, 1, 0)])
def test_empty_sequences(built, use, B, Lq, Lk):
    use(built)
    args = _attention(B=B, Lq=Lq, Lk=Lk, D=16, scheme="t5", causal=True, segments=B > 0)(torch.float16, CPU)
    leaves = {name: getattr(args, name).requires_grad_() for name in LEARNED if getattr(args, name) is not None}
    out, _lse = attention(args._replace(**leaves))
    assert out.shape == args.q.shape and not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), list(leaves.values())))


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(dtype=torch.float32), "served are fp16 and bf16"),
        (dict(D=20), "the head dimension is 20; served are multiples of 8 up to 128"),
        (dict(D=136), "the head dimension is 136"),
        (dict(offset=2**29), "the offset is 536870912 for 4 queries and 4 keys; served are sums below 2²⁹"),
        (dict(scale=-1.0), "served are positive scales"),
        (dict(dropout=0.1), "it does not serve dropout"),
        (dict(softcap=50.0), "it does not serve softcap"),
        (dict(bias=torch.zeros(1, 1, 1, 4)), "it does not serve bias"),
        (dict(left=-3, right=2), "the band from --3 to 2 is empty"),
        (dict(v=torch.zeros(1, 1, 4, 16)), "served are equal dtypes"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals_in_words(built, use, changes, why):
    use(built)
    changes = dict(changes)
    q = torch.zeros(1, 1, 4, changes.pop("D", 16), dtype=changes.pop("dtype", torch.float16))
    with pytest.raises(BackendError, match=why):
        attention(Arguments.of(q, q, q)._replace(**changes))


FAULTS = {  # what is planted into the forward pass → (file, the text, what stands instead, what is seen)
    "no barrier": ("forward.cu", "        __syncthreads();\n", "", "a race: shared memory is"),
    "a copy too late": ("forward.cu", "wait_for_copies<0>", "wait_for_copies<1>", "that a copy is still bringing"),
    "a row too many": ("tile.cuh", "i * STEP < left", "i * STEP <= left", "that the launch was not given"),
    "a table without ends": ("pairs.cuh", "if (inside)", "if (true)", "that the launch was not given"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(built, use, fault, tmp_path):
    file, old, new, seen = FAULTS[fault]
    use(on_host.changed(built, tmp_path, "forward", file, old, new))
    with pytest.raises(RuntimeError, match=seen):
        attention(SMALL)


@pytest.mark.parametrize(
    "old, new, conflicts",
    [
        ("(c ^ (row & 7))", "c", True),  # without a swizzle
        ("copy_async(tile.chunk(row + i * STEP, c)", "copy_async(tile.chunk(row + i * STEP, c ^ 1)", False),
    ],
    ids=["no swizzle", "another swizzle for copies"],
)
def test_a_planted_swizzle_is_seen(built, use, tmp_path, old, new, conflicts):
    changed = on_host.changed(built, tmp_path, "forward", "tile.cuh", old, new)
    use(changed)
    out, _lse = attention(SMALL)
    assert (on_host.watch(changed, "bank_conflicts").value > 0) == conflicts
    use(built)
    assert torch.equal(attention(SMALL)[0], out) == conflicts

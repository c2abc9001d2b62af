"""However a text is cut, every scheme gives the same: whole, by the token with cached keys, in chunks, packed, or
padded."""

import pytest
import torch
from cases import POSITIONS, position

import fastlm
from fastlm import masks
from fastlm.nn import Attention, Cache

H, D = 4, 8


def heads(n, L, seed, B=2):
    return torch.randn(B, n, L, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", POSITIONS)
def test_decoding_equals_the_whole(name, kv_heads, backend):
    L, scheme = 19, position(name, H, D, causal=True)
    q, k, v = heads(H, L, 0), heads(kv_heads, L, 1), heads(kv_heads, L, 2)
    for window in (None, (5, 0)):
        whole = fastlm.attention(q, k, v, position=scheme, causal=True, window=window)
        for n in (1, 3):
            steps = [(q[:, :, s : s + n], k[:, :, : s + n], v[:, :, : s + n]) for s in range(0, L, n)]
            pieces = [fastlm.attention(*step, position=scheme, causal=True, window=window) for step in steps]
            torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POSITIONS)
def test_a_module_decodes_with_its_cache(name, backend):
    torch.manual_seed(0)
    layer = Attention(H * D, H, 2, position=position(name, H, D, causal=True))
    x = torch.randn(2, 11, H * D)
    whole = layer(x)
    for n in (1, 3):
        cache = Cache()
        pieces = [layer(x[:, s : s + n], cache=cache) for s in range(0, 11, n)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
        assert len(cache) == 11


@pytest.mark.parametrize("name", POSITIONS)
def test_padding_on_the_left_is_a_segment(name, backend):
    """So prompts of several lengths end together, and are continued together."""
    L, pads, scheme = 9, (0, 4), position(name, H, D, causal=True)
    q, k, v = heads(H, L, 0), heads(2, L, 1), heads(2, L, 2)
    segments = (torch.arange(L) >= torch.tensor(pads)[:, None]).long()
    whole = fastlm.attention(q, k, v, position=scheme, causal=True, segments=segments)
    last = fastlm.attention(q[:, :, -1:], k, v, position=scheme, causal=True, segments=(segments[:, -1:], segments))
    torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-5, atol=1e-5)
    for row, pad in enumerate(pads):
        text = (slice(row, row + 1), slice(None), slice(pad, L))
        alone = fastlm.attention(q[text], k[text], v[text], position=scheme, causal=True)
        torch.testing.assert_close(whole[text], alone, rtol=1e-5, atol=1e-5)


STARTS = torch.tensor([0, 7, 8, 8, 20], dtype=torch.int32)  # of documents of 7, 1, 0 and 12 tokens; 3 of padding follow
LENGTH = 23


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", POSITIONS)
def test_packed_documents_are_as_if_alone(name, causal, backend):
    scheme = position(name, H, D, causal)
    q, k, v = (heads(n, LENGTH, seed, B=1).requires_grad_() for seed, n in enumerate((H, 2, 2)))
    leaves, grad = [q, k, v, *scheme.parameters()], heads(H, 20, 3, B=1)
    packed = fastlm.attention(q, k, v, position=scheme, causal=causal, segments=masks.segments_of(STARTS, LENGTH))[
        :, :, :20
    ]
    spans = [slice(a, b) for a, b in STARTS.unfold(0, 2, 1).tolist()]
    alone = torch.cat(
        [fastlm.attention(q[:, :, s], k[:, :, s], v[:, :, s], position=scheme, causal=causal) for s in spans], 2
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out, leaves, grad, materialize_grads=True) for out in (packed, alone)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_module_takes_packed_documents(backend):
    torch.manual_seed(0)
    layer, x = Attention(H * D, H, position="alibi"), torch.randn(1, LENGTH, H * D)
    packed = layer(x, segments=masks.segments_of(STARTS, LENGTH))
    torch.testing.assert_close(packed[:, 8:20], layer(x[:, 8:20]), rtol=1e-5, atol=1e-5)


def test_a_module_continues_prompts_padded_on_the_left(backend):
    torch.manual_seed(0)
    layer, x, pads, cache = Attention(H * D, H, position="alibi"), torch.randn(2, 9, H * D), (0, 4), Cache()
    segments = (torch.arange(9) >= torch.tensor(pads)[:, None]).long()
    pieces = [
        layer(x[:, a:b], segments=(segments[:, a:b], segments[:, :b]), cache=cache) for a, b in ((0, 6), (6, 8), (8, 9))
    ]
    for row, pad in enumerate(pads):
        torch.testing.assert_close(
            torch.cat(pieces, 1)[row, pad:], layer(x[row : row + 1, pad:])[0], rtol=1e-5, atol=1e-5
        )


def test_segments_and_positions():
    segments = masks.segments_of(STARTS, LENGTH)
    assert segments.tolist() == [[0] * 7 + [1] + [3] * 12 + [4] * 3]
    assert masks.positions_of(segments).tolist() == [[*range(7), 0, *range(12), *range(3)]]
    assert masks.positions_of(torch.tensor([[5, 5, 2, 2], [1, 1, 1, 1], [0, 1, 0, 0]])).tolist() == [
        [0, 1, 0, 1],
        [0, 1, 2, 3],
        [0, 0, 0, 1],
    ]
    assert masks.segments_of(STARTS.long(), 5).tolist() == [[0] * 5]
    assert masks.segments_of(STARTS, 0).shape == masks.positions_of(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0)
    for wrong in (STARTS.float(), STARTS[None], STARTS.bool()):
        with pytest.raises(ValueError, match=r"cu_seqlens must be \[documents \+ 1\] integers; got"):
            masks.segments_of(wrong, LENGTH)
    with pytest.raises(ValueError, match=r"cu_seqlens is a list; give a tensor: torch.tensor\(cu_seqlens\)"):
        masks.segments_of(STARTS.tolist(), LENGTH)
    with pytest.raises(ValueError, match=r"must not decrease; got \[0, 9, 4\]. Give where documents start"):
        masks.segments_of(torch.tensor([0, 9, 4]), LENGTH)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_segments_of_narrow_integers(dtype):
    segments = masks.segments_of(torch.tensor([0, 100, 200], dtype=dtype), 300)
    assert segments.tolist() == [[0] * 100 + [1] * 100 + [2] * 100]


def test_lengths_of_documents_do_not_recompile():
    """They are values, not shapes: one graph for every packing."""
    compiled = torch.compile(
        lambda starts: masks.positions_of(masks.segments_of(starts, LENGTH)), fullgraph=True, backend="eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for starts in (STARTS, STARTS.flip(0).neg() + 20):
            assert torch.equal(compiled(starts), masks.positions_of(masks.segments_of(starts, LENGTH)))


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_embedded_positions_start_over(name):
    scheme = fastlm.positions.make(name, context=12, dim=6)
    embedded = scheme.embed(masks.positions_of(masks.segments_of(STARTS, 20)))
    assert embedded.shape == (1, 20, 6)
    assert torch.equal(embedded[0, 8:], scheme.embed(torch.arange(12)))
    assert torch.equal(embedded[0, 7:8], scheme.embed(torch.arange(1)))
    assert torch.equal(scheme.embed(torch.tensor([[2, 3], [0, 5]]))[1, 1], scheme.embed(torch.arange(6))[5])

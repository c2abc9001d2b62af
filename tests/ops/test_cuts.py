"""However a text is cut, every scheme gives the same: whole, by the token with cached keys, in chunks, packed, or
padded.
"""

import re

import pytest
import torch
from cases import POSITIONS, position

import fastlm
from fastlm import masks
from fastlm.nn import Attention, KVCache

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
        cache = KVCache()
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
    packed = fastlm.attention(
        q, k, v, position=scheme, causal=causal, segments=masks.segments_from_cu_seqlens(STARTS, LENGTH)
    )[:, :, :20]
    spans = [slice(a, b) for a, b in STARTS.unfold(0, 2, 1).tolist()]
    alone = torch.cat(
        [fastlm.attention(q[:, :, s], k[:, :, s], v[:, :, s], position=scheme, causal=causal) for s in spans], 2
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out, leaves, grad, materialize_grads=True) for out in (packed, alone)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


QUERIES, KEYS = torch.tensor([0, 3, 3, 8, 10]), torch.tensor([0, 5, 9, 11, 13])  # where documents start and end
PACKED_APART = dict(
    segments=(masks.segments_from_cu_seqlens(QUERIES, 11), masks.segments_from_cu_seqlens(KEYS, 14)),
    order=(masks.ranks_from_cu_seqlens(QUERIES, 11), masks.ranks_from_cu_seqlens(KEYS, 14)),
)


@pytest.mark.parametrize("name", ["none", "rope"])
def test_documents_with_fewer_queries_or_more_than_keys(name, backend):
    """The last query of each stands at its last key, as in flash-attn's varlen functions and in a document alone."""
    scheme = position(name, H, D, causal=True)
    q, k, v = (heads(n, L, seed, B=1).requires_grad_() for seed, (n, L) in enumerate(((H, 11), (2, 14), (2, 14))))
    turned = q, k
    if name == "rope":
        angles = [scheme.angles(ranks[0].double()) for ranks in PACKED_APART["order"]]
        turned = (fastlm.rotate(x, a.cos().float(), a.sin().float()) for x, a in zip((q, k), angles, strict=True))
    packed = fastlm.attention(*turned, v, **PACKED_APART)[:, :, :10]
    spans = zip(*([slice(a, b) for a, b in x.unfold(0, 2, 1).tolist()] for x in (QUERIES, KEYS)), strict=True)
    each = [(q[:, :, i], k[:, :, j], v[:, :, j]) for i, j in spans]
    alone = torch.cat([fastlm.attention(*document, position=scheme, causal=True) for document in each], 2)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    grad = heads(H, 10, 7, B=1)
    for got, expected in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (packed, alone)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [dict(causal=True), dict(window=3), dict(position=position("alibi", H, D, True))])
def test_documents_packed_apart_are_not_counted_along_the_row(options):
    """Where a query would stand at a key of another document that has queries of its own."""
    q, k = heads(H, 10, 0, B=2), heads(2, 13, 1, B=2)
    starts = (torch.tensor([0, 3, 8, 10]), 10), (torch.tensor([0, 5, 7, 13]), 13)
    segments = tuple(masks.segments_from_cu_seqlens(*x).expand(2, -1) for x in starts)
    message = r"packed apart in row 0, and causal, window and position count along .* give order=\(masks.ranks_from"
    with pytest.raises(ValueError, match=message):
        fastlm.attention(q, k, k, segments=segments, **options)
    fastlm.attention(q, k, k, segments=segments)


def test_what_is_packed_alike_may_say_so_twice():
    """Or say that some queries, or some keys, are nobody's; or where the first query stands."""
    documents = masks.segments_from_cu_seqlens(STARTS, LENGTH)
    q, k = heads(H, 5, 0, B=1), heads(2, LENGTH, 1, B=1)
    whole = fastlm.attention(q, k, k, causal=True, segments=(documents[:, -5:], documents))
    nobodys = documents.masked_fill(documents == 4, -1)
    apart = fastlm.attention(q, k, k, causal=True, segments=(nobodys[:, -5:].int(), documents))
    torch.testing.assert_close(apart[:, :, :2], whole[:, :, :2])
    assert not apart[:, :, 2:].any()
    present = (documents < 4).long()
    everyones = fastlm.attention(q, k, k, causal=True, segments=(torch.ones_like(present[:, -5:]), present))
    alone = fastlm.attention(q, k, k, causal=True, key_lengths=torch.tensor([20]))
    torch.testing.assert_close(everyones, alone)
    ahead = fastlm.attention(q, k, k, causal=True, segments=(documents[:, :5], documents), offset=0)
    torch.testing.assert_close(ahead, fastlm.attention(q, k[:, :, :5], k[:, :, :5], causal=True))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:  # whose values nobody can read
        fake = [mode.from_tensor(x) for x in (q, k, QUERIES[None], KEYS[None].repeat(1, 5)[:, :LENGTH])]
        assert fastlm.attention(fake[0], fake[1], fake[1], causal=True, segments=(fake[2], fake[3])).shape == q.shape


def test_a_module_takes_packed_documents(backend):
    torch.manual_seed(0)
    layer, x = Attention(H * D, H, position="alibi"), torch.randn(1, LENGTH, H * D)
    packed = layer(x, segments=masks.segments_from_cu_seqlens(STARTS, LENGTH))
    torch.testing.assert_close(packed[:, 8:20], layer(x[:, 8:20]), rtol=1e-5, atol=1e-5)


def test_a_module_continues_prompts_padded_on_the_left(backend):
    torch.manual_seed(0)
    layer, x, pads, cache = Attention(H * D, H, position="alibi"), torch.randn(2, 9, H * D), (0, 4), KVCache()
    segments = (torch.arange(9) >= torch.tensor(pads)[:, None]).long()
    pieces = [
        layer(x[:, a:b], segments=(segments[:, a:b], segments[:, :b]), cache=cache) for a, b in ((0, 6), (6, 8), (8, 9))
    ]
    for row, pad in enumerate(pads):
        torch.testing.assert_close(
            torch.cat(pieces, 1)[row, pad:], layer(x[row : row + 1, pad:])[0], rtol=1e-5, atol=1e-5
        )


def test_segments_and_positions():
    segments = masks.segments_from_cu_seqlens(STARTS, LENGTH)
    assert segments.tolist() == [[0] * 7 + [1] + [3] * 12 + [4] * 3]
    assert masks.position_ids(segments).tolist() == [[*range(7), 0, *range(12), *range(3)]]
    assert masks.position_ids(torch.tensor([[5, 5, 2, 2], [1, 1, 1, 1], [0, 1, 0, 0]])).tolist() == [
        [0, 1, 0, 1],
        [0, 1, 2, 3],
        [0, 0, 0, 1],
    ]
    assert masks.ranks_from_cu_seqlens(STARTS, LENGTH).tolist() == [[*range(-7, 0), -1, *range(-12, 0), *range(-3, 0)]]
    assert masks.ranks_from_cu_seqlens(torch.tensor([0, 3], dtype=torch.uint8), 5).tolist() == [[-3, -2, -1, -2, -1]]
    assert (
        masks.segments_from_cu_seqlens(torch.tensor([0]), 0).shape
        == masks.position_ids(torch.zeros(1, 0, dtype=torch.long)).shape
        == (1, 0)
    )
    for wrong in (STARTS.float(), STARTS[None], STARTS.bool()):
        with pytest.raises(ValueError, match=r"cu_seqlens must be \[documents \+ 1\] integers; got"):
            masks.segments_from_cu_seqlens(wrong, LENGTH)
    with pytest.raises(ValueError, match=r"cu_seqlens is a list; give a tensor: torch.tensor\(cu_seqlens\)"):
        masks.segments_from_cu_seqlens(STARTS.tolist(), LENGTH)
    for wrong in ([0, 9, 4], [2, 4], [0, 9, LENGTH + 1], []):  # the second are lengths, the third another row's
        with pytest.raises(ValueError, match=f"within the row of {LENGTH}; got {re.escape(str(wrong))}. Give"):
            masks.segments_from_cu_seqlens(torch.tensor(wrong, dtype=torch.int64), LENGTH)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_segments_of_narrow_integers(dtype):
    segments = masks.segments_from_cu_seqlens(torch.tensor([0, 100, 200], dtype=dtype), 300)
    assert segments.tolist() == [[0] * 100 + [1] * 100 + [2] * 100]


def test_lengths_of_documents_do_not_recompile():
    """They are values, not shapes: one graph for every packing."""
    compiled = torch.compile(
        lambda starts: masks.position_ids(masks.segments_from_cu_seqlens(starts, LENGTH)),
        fullgraph=True,
        backend="eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for starts in (STARTS, STARTS.flip(0).neg() + 20):
            assert torch.equal(compiled(starts), masks.position_ids(masks.segments_from_cu_seqlens(starts, LENGTH)))


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_embedded_positions_start_over(name):
    scheme = fastlm.positions.make(name, context=12, dim=6)
    embedded = scheme.embed(masks.position_ids(masks.segments_from_cu_seqlens(STARTS, 20)))
    assert embedded.shape == (1, 20, 6)
    assert torch.equal(embedded[0, 8:], scheme.embed(torch.arange(12)))
    assert torch.equal(embedded[0, 7:8], scheme.embed(torch.arange(1)))
    assert torch.equal(scheme.embed(torch.tensor([[2, 3], [0, 5]]))[1, 1], scheme.embed(torch.arange(6))[5])


def test_padding_is_a_segment_that_no_other_token_is_in():
    segments = torch.tensor([[0, 1, 255, 255]], dtype=torch.uint8)  # whose 0 - 1 is 255
    apart = masks.padding_apart(segments, torch.tensor([[True, True, True, False]]))
    assert apart.tolist() == [[0, 1, 255, -1]]

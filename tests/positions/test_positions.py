"""Positional schemes against their papers and the checkpoints they must read."""

import inspect
import math
from functools import partial

import pytest
import torch
from cases import POSITIONS, position

import fastlm
from fastlm import positions
from fastlm.positions import (
    SCHEMES,
    ALiBi,
    DeBERTa,
    Kerple,
    Position,
    RoPE,
    Shaw,
    Sinusoidal,
    T5Bias,
    TransformerXL,
    XLNet,
    alibi_slopes,
    deberta_bucket,
    t5_bucket,
)


def on_a_grid(q, k, v, scheme, causal):
    """Attention with everything that a scheme says of a distance laid out for each query and key: L×L tensors."""
    (H, Lq, D), Lk = q.shape[1:], k.shape[2]
    i, j = torch.arange(Lk - Lq, Lk)[:, None], torch.arange(Lk)
    distance, vectors = j - i, scheme.vectors((j - i).flatten())
    grid = lambda rows: rows.unflatten(1, distance.shape)
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    angles = scheme.angles(j.double())
    if angles is not None:
        cos, sin = scheme.magnitude * angles.cos(), scheme.magnitude * angles.sin()
        q = fastlm.rotate(q, cos[Lk - Lq :], sin[Lk - Lq :], layout=scheme.layout)
        k = fastlm.rotate(k, cos, sin, layout=scheme.layout)
    content, positional = (q if b is None else q + b[:, None] for b in (vectors.content_bias, vectors.position_bias))
    score = content @ k.mT
    if vectors.query_vectors is not None:
        score = score + torch.einsum("bhid,hijd->bhij", positional, grid(vectors.query_vectors))
    if vectors.key_vectors is not None:
        score = score + torch.einsum("bhjd,hijd->bhij", k, grid(vectors.key_vectors))
    score = score / (vectors.terms * D) ** 0.5
    bias = scheme.bias(distance.flatten())
    score = score if bias is None else score + grid(bias)
    p = score.masked_fill(causal & (distance > 0), -torch.inf).softmax(-1)
    out = p @ v
    return (
        out if vectors.value_vectors is None else out + torch.einsum("bhij,hijd->bhid", p, grid(vectors.value_vectors))
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", POSITIONS)
def test_every_scheme_and_its_gradients_on_a_grid(name, causal, backend):
    scheme = position(name, 4, 8, causal)
    shapes = ((4, 20), (2, 33), (2, 33), (4, 20))  # heads and lengths of q, k, v and out
    q, k, v, grad = (
        torch.randn(2, h, L, 8, generator=torch.Generator().manual_seed(i)) for i, (h, L) in enumerate(shapes)
    )
    leaves = [x.requires_grad_() for x in (q, k, v, *scheme.parameters())]
    expected = on_a_grid(*leaves[:3], scheme, causal)
    got = fastlm.attention(*leaves[:3], position=scheme, causal=causal)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out, leaves, grad, materialize_grads=True) for out in (got, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * (1 + theirs.abs().max().item()))


CAUSAL_EDGES = [
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    19,
    21,
    24,
    27,
    31,
    35,
    40,
    46,
    52,
    59,
    67,
    77,
    87,
    99,
    113,
]
SYMMETRIC_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


def test_t5_buckets_have_the_published_edges():
    n = torch.arange(300)
    causal = torch.bucketize(n, torch.tensor(CAUSAL_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=True), causal)
    assert not t5_bucket(n, causal=True).any()
    one_side = torch.bucketize(n, torch.tensor(SYMMETRIC_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=False), one_side)
    assert torch.equal(t5_bucket(n[1:], causal=False), one_side[1:] + 16)
    # the first of the far side is the near side's 0
    assert not (t5_bucket(torch.arange(-300, 300), causal=False) == 16).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 64), (64, 256)])
def test_t5_buckets_match_transformers(causal, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="pip install '.[test]'")
    d = torch.arange(-700, 700)
    theirs = t5.T5Attention._relative_position_bucket(d, not causal, buckets, max_distance)
    assert torch.equal(t5_bucket(d, causal, buckets, max_distance), theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias_matches_transformers(causal):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="pip install '.[test]'")
    theirs = t5.T5Attention(
        t5.T5Config(d_model=8, num_heads=2, d_kv=4, is_decoder=causal), has_relative_attention_bias=True
    )
    ours = T5Bias(2, causal=causal)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    dense = theirs.compute_bias(5, 200, past_seen_tokens=195)
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 200, 4), torch.randn(1, 2, 200, 4)
    hidden = torch.ones(5, 200).triu(196).bool() & causal
    expected = torch.softmax((q @ k.mT + dense).masked_fill(hidden, -torch.inf), -1) @ v
    torch.testing.assert_close(fastlm.attention(q, k, v, position=ours, causal=causal, scale=1.0), expected)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]))
    torch.testing.assert_close(alibi_slopes(12)[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    for heads in range(1, 113):  # MPT's construction: odd ranks, then even, of the next power of two
        power = 2 ** math.ceil(math.log2(heads))
        slopes = 2.0 ** (-8 * torch.arange(1, power + 1) / power)
        torch.testing.assert_close(
            alibi_slopes(heads), (torch.cat((slopes[1::2], slopes[::2]))[:heads] if power != heads else slopes)
        )


def test_alibi_is_linear_in_distance_and_unscaled():
    bias = ALiBi(8).bias(torch.arange(-5, 4))
    assert torch.equal(bias[0], -0.5 * torch.arange(-5, 4).abs())
    assert not list(ALiBi(8).parameters())
    learned = ALiBi(8, learned=True)
    learned.bias(torch.arange(-5, 1)).sum().backward()
    assert torch.equal(learned.slopes.grad, torch.full((8,), -15.0))


@pytest.mark.parametrize("heads", [1, 3, 6, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_matches_bloom(causal, heads):
    """Bloom adds slope · j, by the key alone: after a causal softmax that is the same, and its log-sum-exp is off by
    slope · i.
    """
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="pip install '.[test]'")
    q, k, v = (torch.randn(1, heads, 9, 4) for _ in range(3))
    i, j, slopes = torch.arange(9)[:, None], torch.arange(9), alibi_slopes(heads)
    by_key = bloom.build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).view(1, heads, 1, 9)
    torch.testing.assert_close(by_key, (slopes[:, None, None] * j)[None])
    score = q @ k.mT / 2 + (by_key.masked_fill(j > i, -torch.inf) if causal else -slopes[:, None, None] * (i - j).abs())
    out, lse = fastlm.attention(q, k, v, position=ALiBi(heads), causal=causal, return_lse=True)
    torch.testing.assert_close(out, score.softmax(-1) @ v)
    torch.testing.assert_close(lse, score.logsumexp(-1) - (slopes[:, None] * i[:, 0] if causal else 0))


@pytest.mark.parametrize("scheme", [ALiBi(12), Kerple(4)], ids=["alibi", "kerple"])
def test_a_model_cast_to_16_bits_keeps_its_distances(scheme):
    with torch.no_grad():
        for p in scheme.parameters():
            p.copy_(p.bfloat16())
    exact = scheme.terms(1024, 1024).table
    assert torch.equal(scheme.bfloat16().terms(1024, 1024).table, exact)


def test_kerple_formula():
    scheme = Kerple(2)
    with torch.no_grad():
        scheme.r1.copy_(torch.tensor([1.0, 2.0])), scheme.r2.copy_(torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(
        scheme.bias(torch.tensor([-4, 0])), torch.tensor([[-math.log(3.0), 0.0], [-2 * math.log(13.0), 0.0]])
    )


def test_rope_scores_see_only_differences():
    q, k = torch.randn(1, 1, 1, 64, dtype=torch.float64), torch.randn(1, 1, 1, 64, dtype=torch.float64)
    rope = RoPE(64)
    turn = lambda x, p: fastlm.rotate(
        x, *(f(rope.angles(torch.tensor([float(p)], dtype=torch.float64))) for f in (torch.cos, torch.sin))
    )
    with fastlm.use_backend("reference"):  # the one that takes fp64
        scores = [(turn(q, p + 7) * turn(k, p)).sum() for p in (0, 100, 131_000)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_rope_layouts_differ_by_a_permutation():
    x = torch.randn(1, 2, 9, 16)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    angles = RoPE(16).angles(torch.arange(9.0, dtype=torch.float64)).float()
    interleaved = fastlm.rotate(x, angles.cos(), angles.sin(), layout="interleaved")
    half = fastlm.rotate(x[..., order], angles.cos(), angles.sin(), layout="half")
    torch.testing.assert_close(interleaved[..., order], half)


def test_rope_is_exact_at_far_positions():
    """fp32 angles are off by about 1e-2 at position 131k; ours must match fp64 to fp32's last bits."""
    cos, _ = RoPE(128).terms(1, 131_073).rotate_q
    exact = torch.cos(131_072 * 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128))
    assert (cos[0].double() - exact).abs().max() < 1e-7


def test_rope_matches_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="pip install '.[test]'")
    q = torch.randn(1, 2, 30, 32)
    terms = RoPE(32).terms(30, 30)
    cos, sin = (torch.cat((t, t), -1)[None] for t in terms.rotate_q)
    theirs, _ = llama.apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(fastlm.rotate(q, *terms.rotate_q), theirs)


def test_rope_turns_a_part():
    x = torch.randn(1, 1, 5, 32)
    terms = RoPE(32, fraction=0.25).terms(5, 5)
    turned = fastlm.rotate(x, *terms.rotate_q)
    assert torch.equal(turned[..., 8:], x[..., 8:]) and not torch.equal(turned[..., :8], x[..., :8])


def test_sinusoidal_shift_is_a_rotation():
    pe = Sinusoidal(64).embed(torch.arange(50)).double()
    pairs = pe.unflatten(-1, (32, 2))
    angles = 3 * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    sin, cos = pairs.unbind(-1)
    shifted = torch.stack((sin * angles.cos() + cos * angles.sin(), cos * angles.cos() - sin * angles.sin()), -1)
    torch.testing.assert_close(shifted[:-3], pairs[3:], rtol=1e-5, atol=1e-5)
    assert pe.abs().max() <= 1


def test_transformer_xl_matches_the_relative_shift():
    """Dai et al. 2019, appendix B: a zero column, a reshape, and r counted from the farthest key."""
    scheme = TransformerXL(64, 4, 16)
    with torch.no_grad():
        scheme.content_bias.normal_(), scheme.position_bias.normal_()
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 16)
    angles = torch.outer(torch.arange(7, -1, -1.0), 10000 ** (-torch.arange(0, 64, 2.0) / 64))
    r = scheme.project(torch.cat((angles.sin(), angles.cos()), -1)).unflatten(-1, (4, 16))
    content = torch.einsum("bhid,bhjd->bhij", q + scheme.content_bias[:, None], k)
    position = torch.einsum("bhid,jhd->bhij", q + scheme.position_bias[:, None], r)
    shifted = torch.cat((torch.zeros(2, 4, 5, 1), position), -1).view(2, 4, 9, 5)[:, :, 1:].reshape(2, 4, 5, 8)
    future = torch.ones(5, 8).triu(4).bool()
    expected = ((content + shifted) / 4).masked_fill(future, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(fastlm.attention(q, k, v, position=scheme, causal=True), expected, rtol=1e-4, atol=1e-5)


def test_deberta_v1_matches_transformers():
    v1 = pytest.importorskip("transformers.models.deberta.modeling_deberta", reason="pip install '.[test]'")
    config = v1.DebertaConfig(
        hidden_size=32, num_attention_heads=4, relative_attention=True, pos_att_type=["c2p", "p2c"],
        max_relative_positions=20,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs, ours = v1.DisentangledSelfAttention(config), DeBERTa(32, 4, 8, span=20)
    with torch.no_grad():
        ours.table.weight.normal_(), theirs.q_bias.normal_(), theirs.v_bias.normal_()
    ours.key.load_state_dict(theirs.pos_proj.state_dict())
    ours.query.load_state_dict(theirs.pos_q_proj.state_dict())
    for L in (13, 50):  # within the span and beyond
        x = torch.randn(2, L, 32)
        distance = (torch.arange(L)[:, None] - torch.arange(L))[None]
        expected, _ = theirs(x, torch.ones(2, 1, L, L), relative_pos=distance, rel_embeddings=ours.table.weight)
        q, k, v = theirs.in_proj(x).unflatten(-1, (4, 24)).transpose(1, 2).chunk(3, -1)
        q, v = (t + b.view(4, 1, 8) for t, b in ((q, theirs.q_bias), (v, theirs.v_bias)))
        got = fastlm.attention(q, k, v, position=ours).transpose(1, 2).flatten(2)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["v2", "v3_shares_projections"])
@pytest.mark.parametrize("buckets", [0, 16])
def test_deberta_matches_transformers(buckets, shared):
    v2 = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2", reason="pip install '.[test]'")
    config = v2.DebertaV2Config(
        hidden_size=32, num_attention_heads=4, relative_attention=True, pos_att_type=["c2p", "p2c"],
        share_att_key=shared,
        position_buckets=buckets or -1, max_relative_positions=40, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = v2.DisentangledSelfAttention(config)
    ours = DeBERTa(32, 4, 8, span=40, buckets=buckets)
    with torch.no_grad():
        ours.table.weight.normal_()
    if shared:
        ours.key, ours.query = theirs.key_proj, theirs.query_proj
    else:
        ours.key, ours.query = theirs.pos_key_proj, theirs.pos_query_proj
    x = torch.randn(2, 60, 32)
    q, k, v = (
        project(x).unflatten(-1, (4, 8)).transpose(1, 2)
        for project in (theirs.query_proj, theirs.key_proj, theirs.value_proj)
    )
    expected, _ = theirs(x, torch.ones(2, 1, 60, 60), rel_embeddings=ours.table.weight)
    got = fastlm.attention(q, k, v, position=ours).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_deberta_buckets():
    published = {150: 143, 200: 169, 256: 192, 400: 233, 511: 255, 128: 128, 5: 5}
    n = torch.tensor(list(published))
    assert deberta_bucket(n, 256, 512).tolist() == list(published.values())
    assert deberta_bucket(-n, 256, 512).tolist() == [-b for b in published.values()]


@pytest.mark.parametrize("buckets, span", [(256, 512), (32, 128), (16, 40)])
def test_deberta_buckets_match_transformers(buckets, span):
    v2 = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2", reason="pip install '.[test]'")
    d = torch.arange(-3 * span, 3 * span)
    assert torch.equal(deberta_bucket(d, buckets, span), v2.make_log_bucket_position(d, buckets, span).long())


@pytest.mark.parametrize("memory, clamp", [(0, 0), (5, 0), (5, 4)])
def test_xlnet_matches_transformers(memory, clamp):
    """Both streams' ingredients: bidirectional distances, memory, relative segments, and a visiting order."""
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet", reason="pip install '.[test]'")
    L, M, config = (
        12,
        12 + memory,
        xlnet.XLNetConfig(d_model=32, n_head=4, n_layer=1, dropout=0.0, clamp_len=clamp or -1),
    )
    theirs, model = xlnet.XLNetRelativeAttention(config), xlnet.XLNetModel(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
    ours = XLNet(32, 4, 8, clamp=clamp)
    with torch.no_grad():
        ours.project.weight.copy_(theirs.r.flatten(1).T), ours.segment.copy_(theirs.seg_embed)
        (
            ours.content_bias.copy_(theirs.r_w_bias),
            ours.position_bias.copy_(theirs.r_r_bias),
            ours.segment_bias.copy_(theirs.r_s_bias),
        )
    x, ranks = torch.randn(2, M, 32), torch.stack([torch.randperm(M) for _ in range(2)])
    segments = torch.tensor([[0] * 5 + [1] * (M - 5), [0] * M])
    project = lambda w, x: torch.einsum("bih,hnd->bnid", x, w)
    q, k, v = project(theirs.q, x[:, memory:]), project(theirs.k, x), project(theirs.v, x)
    of_queries = segments[:, memory:], ranks[:, memory:]
    different = (of_queries[0][:, :, None] != segments[:, None, :]).permute(1, 2, 0)
    hidden = (ranks[:, None, :] > of_queries[1][:, :, None]).permute(1, 2, 0)[..., None].float()
    r = model.relative_positional_encoding(L, M, bsz=2)
    heads = lambda t: t.permute(2, 0, 1, 3)
    seg_mat = torch.nn.functional.one_hot(different.long(), 2).float()
    expected = theirs.rel_attn_core(
        heads(q), heads(k), heads(v), torch.einsum("ibh,hnd->ibnd", r, theirs.r), seg_mat=seg_mat, attn_mask=hidden
    )
    group_bias = ours.group_bias(q, (of_queries[0], segments) if memory else segments)
    got = fastlm.attention(q, k, v, position=ours, order=(of_queries[1], ranks), group_bias=group_bias)
    torch.testing.assert_close(heads(got), expected, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert all(p.grad.any() for p in ours.parameters())


def test_xlnets_segments_in_16_bits_are_summed_in_32():
    scheme, segments = XLNet(32, 4, 8).bfloat16(), torch.zeros(1, 6, dtype=torch.long)
    q = torch.randn(1, 4, 6, 8).bfloat16()
    with torch.no_grad():
        scheme.segment.normal_(), scheme.segment_bias.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        same = scheme.group_bias(q, segments)[0]
    exact = torch.einsum(
        "bhid,hd->bhi",
        q.double() + scheme.segment_bias.double()[:, None],
        scheme.segment[0].double() - scheme.segment[1].double(),
    )
    torch.testing.assert_close(same, (exact / 8**0.5).float(), rtol=1e-5, atol=1e-5)


MAKERS = {name: partial(position, name, 4, 8, True) for name in POSITIONS}
MAKERS |= {
    "learned": partial(positions.Learned, 9, 32),
    "sinusoidal": partial(Sinusoidal, 32),
    "xlnet": partial(XLNet, 32, 4, 8),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_schemes_made_on_the_meta_device(make):
    """As FSDP2 has it: made on meta, emptied onto a device, then filled by reset_parameters or from a checkpoint."""
    exact = make()
    with torch.device("meta"):
        scheme = make()
        assert all(p.is_meta for p in scheme.parameters())
        if not scheme.embeds():
            assert all(x.is_meta for x in flat(scheme.terms(5, 9, device=torch.device("meta"))))
    scheme.to_empty(device="cpu")
    for p in scheme.parameters():
        torch.nn.init.constant_(p, torch.nan)
    for module in scheme.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() and p.std() < 1 for p in scheme.parameters() if p.numel() > 4)
    scheme.load_state_dict(exact.state_dict())
    for mine, theirs in zip(flat(scheme.terms(5, 9)), flat(exact.terms(5, 9)), strict=True):
        assert torch.equal(mine, theirs)
    constants = [x.clone() for x in scheme.buffers()]
    assert all(
        torch.equal(x, y) for x, y in zip(scheme.to("meta").to_empty(device="cpu").buffers(), constants, strict=True)
    )


def flat(terms):
    return [
        x
        for x in torch.utils._pytree.tree_leaves((*terms[:2], terms.table, *terms.vectors))
        if isinstance(x, torch.Tensor)
    ]


LEARNED = [
    T5Bias,
    Shaw,
    TransformerXL,
    XLNet,
    partial(DeBERTa, span=16, buckets=8),
    partial(positions.Learned, context=64),
]


@pytest.mark.parametrize("scheme", LEARNED)
def test_what_is_learned_starts_small_and_biases_at_zero(scheme):
    facts = inspect.signature(scheme).parameters.keys() & {"dim", "heads", "head_dim"}
    for name, p in scheme(**{fact: {"dim": 32, "heads": 4, "head_dim": 8}[fact] for fact in facts}).named_parameters():
        assert not p.any() if name.endswith("bias") else 0.01 < p.std() < 0.03, name


def test_learned_slopes_start_as_alibis():
    scheme = ALiBi(6, learned=True)
    torch.nn.init.zeros_(scheme.slopes)
    scheme.reset_parameters()
    assert torch.equal(scheme.slopes, alibi_slopes(6)) and scheme.slopes.requires_grad
    buffer = ALiBi(6)
    buffer.reset_parameters()
    assert torch.equal(buffer.slopes, alibi_slopes(6))


@pytest.mark.parametrize("name", POSITIONS)
def test_fp64_schemes_pass_gradcheck(name):
    scheme = position(name, 2, 4, True).double()
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(*leaves):
        return fastlm.attention(q, k, v, position=scheme.terms(5, 5, dtype=torch.float64), causal=True)

    with fastlm.use_backend("reference"):  # the one that takes fp64
        assert torch.autograd.gradcheck(attend, (q, k, v, *scheme.parameters()), fast_mode=True)


def test_rope_turns_fp64_by_fp64_angles():
    terms = RoPE(8).terms(3, 3, dtype=torch.float64)
    angles = torch.outer(
        torch.arange(3.0, dtype=torch.float64), 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    )
    torch.testing.assert_close(terms.rotate_q, (angles.cos(), angles.sin()), rtol=1e-15, atol=1e-15)
    assert RoPE(8).double().terms(3, 3).rotate_q[0].dtype == torch.float32


def test_terms_stand_where_the_scheme_does():
    meta, cpu = torch.device("meta"), torch.device("cpu")
    for scheme in (T5Bias(2), Shaw(2, 8), TransformerXL(16, 2, 8)):
        assert all(x.device == meta for x in flat(scheme.to(meta).terms(4, 4)))
    for scheme in (RoPE(8), ALiBi(2)):  # their constants stay behind
        assert all(x.device == cpu for x in flat(scheme.to(meta).terms(4, 4)))
        assert all(x.device == meta for x in flat(scheme.terms(4, 4, device=meta)))


@pytest.mark.parametrize("values", [True, False])
def test_shaw_matches_its_equations(values):
    scheme = Shaw(2, 8, reach=3, values=values)
    with torch.no_grad():
        for table in scheme.parameters():
            table.normal_()
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    rows = (torch.arange(9) - torch.arange(9)[:, None]).clamp(-3, 3) + 3
    p = ((q @ k.mT + torch.einsum("bhid,ijd->bhij", q, scheme.key[rows])) / 8**0.5).softmax(-1)
    expected = p @ v + (torch.einsum("bhij,ijd->bhid", p, scheme.value[rows]) if values else 0)
    torch.testing.assert_close(fastlm.attention(q, k, v, position=scheme), expected, rtol=1e-4, atol=1e-5)


def test_a_new_scheme_is_one_class():
    class Cliff(Position, name="cliff"):
        """Every key more than `reach` away costs the same."""

        def __init__(self, heads: int, reach: int = 4):
            super().__init__()
            self.drop, self.reach = torch.nn.Parameter(torch.ones(heads)), reach

        def bias(self, distance):
            return -self.drop[:, None] * (distance.abs() > self.reach)

    try:
        from fastlm.models import ModelConfig, Transformer

        model = Transformer(ModelConfig(position="cliff", dim=32, heads=2, layers=1, context=16))
        model(torch.zeros(1, 16, dtype=torch.long)).sum().backward()
        assert model.position.drop.grad is not None
    finally:
        del SCHEMES["cliff"]


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match="position 'rpoe' is unknown; choose from alibi"):
        positions.make("rpoe", heads=1)
    with pytest.raises(ValueError, match="a scheme named 'rope' exists already"):

        class Other(Position, name="rope"):
            pass

    class Relative(RoPE):
        pass

    assert SCHEMES["rope"] is RoPE
    with pytest.raises(ValueError, match="head_dim 15"):
        RoPE(15)
    with pytest.raises(TypeError, match=r"asks for \['depth'\] without a default"):

        class Deep(Position, name="deep"):
            def __init__(self, depth):
                super().__init__()

    with pytest.raises(IndexError, match="129 positions, but the model learned 128"):
        positions.Learned(128, 4).embed(torch.arange(129))
    assert T5Bias(4).bias(torch.arange(-3, 1)).shape == (4, 4)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: T5Bias(2, max_distance=8),
            r"buckets is 32, of which 16 are exact, and max_distance 8; give buckets ≥ 2 and max_distance > ",
        ),
        (lambda: T5Bias(2, max_distance=12), "max_distance 12"),
        (lambda: T5Bias(2, max_distance=16), "max_distance 16"),
        (
            lambda: T5Bias(2, causal=False, max_distance=8),
            "of which 8 are exact, and max_distance 8; give buckets ≥ 4 and max_distance > buckets",
        ),
        (lambda: T5Bias(2, buckets=1), "buckets is 1, of which 0 are exact"),
        (lambda: T5Bias(2, causal=False, buckets=3), "buckets is 3, of which 0 are exact"),
        (lambda: t5_bucket(torch.arange(9), True, 32, 8), "buckets is 32, of which 16 are exact, and max_distance 8"),
        (
            lambda: deberta_bucket(torch.arange(9), 8, 5),
            r"buckets is 8, exact to 4, and span 5; give buckets ≥ 2 \(0 for none\) and span > ",
        ),
        (lambda: DeBERTa(32, 4, 8, span=5, buckets=8), "buckets is 8, exact to 4, and span 5"),
        (lambda: DeBERTa(32, 4, 8, buckets=-1), "buckets is -1"),
        (lambda: DeBERTa(32, 4, 8, buckets=1), "buckets is 1, exact to 0"),
        (lambda: DeBERTa(32, 4, 8, span=0), "span is 0; give the farthest distance told apart"),
        (
            lambda: TransformerXL(32, 4, 8, clamp=-3),
            "clamp is -3; give the farthest distance told apart, or 0 for no clamp",
        ),
        (lambda: TransformerXL(15, 2, 8), "dim must be even; got 15"),
        (lambda: XLNet(32, 4, 8, clamp=-1), "clamp is -1"),
        (lambda: Shaw(2, 8, reach=-1), "reach is -1; give the farthest distance with a vector of its own, ≥ 0"),
        (lambda: ALiBi(0), "heads is 0; give a whole number of at least 1"),
        (lambda: ALiBi(0, learned=True), "heads is 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (2, 3), (4, 3), (5, 6), (33, 40), (8, 12), (32, 17)])
def test_t5_buckets_stay_in_the_table(causal, buckets, max_distance):
    if not causal and buckets < 4:
        return
    found = t5_bucket(torch.arange(-5000, 5000), causal, buckets, max_distance)
    assert found.min() >= 0 and found.max() < buckets


@pytest.mark.parametrize("buckets, span", [(256, 512), (2, 3), (3, 4), (8, 6), (9, 100)])
def test_deberta_buckets_grow_with_distance(buckets, span):
    d = torch.arange(-span + 1, span)
    found = deberta_bucket(d, buckets, span)
    assert (found.diff() >= 0).all() and torch.equal(found, -found.flip(0)) and found.max() < buckets

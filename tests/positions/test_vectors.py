"""Vectors by distance against their papers and transformers: Transformer-XL, XLNet, DeBERTa, Shaw."""

import pytest
import torch

import fastlm
from fastlm.positions import (
    DeBERTa,
    Shaw,
    TransformerXL,
    XLNet,
    deberta_bucket,
)


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


@pytest.mark.parametrize("buckets, span", [(256, 512), (2, 3), (3, 4), (8, 6), (9, 100)])
def test_deberta_buckets_grow_with_distance(buckets, span):
    d = torch.arange(-span + 1, span)
    found = deberta_bucket(d, buckets, span)
    assert (found.diff() >= 0).all() and torch.equal(found, -found.flip(0)) and found.max() < buckets

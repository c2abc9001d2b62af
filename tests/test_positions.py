"""Positional schemes against their papers and the checkpoints they must read."""

import math

import pytest
import torch

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
    alibi_slopes,
    deberta_bucket,
    t5_bucket,
)

CAUSAL_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
SYMMETRIC_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


def test_t5_buckets_have_the_published_edges():
    n = torch.arange(300)
    causal = torch.bucketize(n, torch.tensor(CAUSAL_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=True), causal)
    assert not t5_bucket(n, causal=True).any()
    one_side = torch.bucketize(n, torch.tensor(SYMMETRIC_EDGES), right=True) - 1
    assert torch.equal(t5_bucket(-n, causal=False), one_side)
    assert torch.equal(t5_bucket(n[1:], causal=False), one_side[1:] + 16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 64), (64, 256)])
def test_t5_buckets_match_transformers(causal, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="pip install '.[test]'")
    d = torch.arange(-700, 700)
    theirs = t5.T5Attention._relative_position_bucket(d, not causal, buckets, max_distance)
    assert torch.equal(t5_bucket(d, causal, buckets, max_distance), theirs)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]))
    torch.testing.assert_close(alibi_slopes(12)[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    for heads in range(1, 113):  # MPT's construction: odd ranks, then even, of the next power of two
        power = 2 ** math.ceil(math.log2(heads))
        slopes = 2.0 ** (-8 * torch.arange(1, power + 1) / power)
        torch.testing.assert_close(alibi_slopes(heads), (torch.cat((slopes[1::2], slopes[::2]))[:heads] if power != heads else slopes))


def test_alibi_is_linear_in_distance_and_unscaled():
    bias = ALiBi(8).bias(torch.arange(-5, 4))
    assert torch.equal(bias[0], -0.5 * torch.arange(-5, 4).abs())
    assert not list(ALiBi(8).parameters())
    learned = ALiBi(8, learned=True)
    learned.bias(torch.arange(-5, 1)).sum().backward()
    assert torch.equal(learned.slopes.grad, torch.full((8,), -15.0))


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
    torch.testing.assert_close(scheme.bias(torch.tensor([-4, 0])), torch.tensor([[-math.log(3.0), 0.0], [-2 * math.log(13.0), 0.0]]))


def test_rope_scores_see_only_differences():
    q, k = torch.randn(1, 1, 1, 64, dtype=torch.float64), torch.randn(1, 1, 1, 64, dtype=torch.float64)
    rope = RoPE(64)
    turn = lambda x, p: fastlm.rotate(x, *(f(rope.angles(torch.tensor([float(p)], dtype=torch.float64))) for f in (torch.cos, torch.sin)))
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


@pytest.mark.parametrize("buckets", [0, 16])
def test_deberta_matches_transformers(buckets):
    v2 = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2", reason="pip install '.[test]'")
    config = v2.DebertaV2Config(
        hidden_size=32, num_attention_heads=4, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=False,
        position_buckets=buckets or -1, max_relative_positions=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = v2.DisentangledSelfAttention(config)
    ours = DeBERTa(32, 4, 8, span=40, buckets=buckets)
    with torch.no_grad():
        ours.table.normal_()
        if not buckets:
            theirs.pos_key_proj.bias.zero_()
    ours.key.load_state_dict({k: v for k, v in theirs.pos_key_proj.state_dict().items() if buckets or k == "weight"})
    ours.query.load_state_dict(theirs.pos_query_proj.state_dict())
    x = torch.randn(2, 60, 32)
    q, k, v = (project(x).unflatten(-1, (4, 8)).transpose(1, 2) for project in (theirs.query_proj, theirs.key_proj, theirs.value_proj))
    expected, _ = theirs(x, torch.ones(2, 1, 60, 60), rel_embeddings=ours.table)
    got = fastlm.attention(q, k, v, position=ours).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_deberta_buckets():
    published = {150: 143, 200: 169, 256: 192, 400: 233, 511: 255, 128: 128, 5: 5}
    n = torch.tensor(list(published))
    assert deberta_bucket(n, 256, 512).tolist() == list(published.values())
    assert deberta_bucket(-n, 256, 512).tolist() == [-b for b in published.values()]


def test_xlnet_matches_transformers():
    """Both streams' ingredients: bidirectional distances, relative segments, and a visiting order."""
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet", reason="pip install '.[test]'")
    L, config = 12, xlnet.XLNetConfig(d_model=32, n_head=4, n_layer=1, dropout=0.0)
    theirs, model = xlnet.XLNetRelativeAttention(config), xlnet.XLNetModel(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
    ours = TransformerXL(32, 4, 8)
    with torch.no_grad():
        ours.project.weight.copy_(theirs.r.flatten(1).T)
        ours.content_bias.copy_(theirs.r_w_bias), ours.position_bias.copy_(theirs.r_r_bias)
    x, segments, ranks = torch.randn(2, L, 32), torch.tensor([[0] * 5 + [1] * 7, [0] * L]), torch.stack([torch.randperm(L) for _ in range(2)])
    project = lambda w: torch.einsum("bih,hnd->bnid", x, w)
    q, k, v = project(theirs.q), project(theirs.k), project(theirs.v)
    different = (segments[:, :, None] != segments[:, None, :]).permute(1, 2, 0)
    hidden = (ranks[:, None, :] > ranks[:, :, None]).permute(1, 2, 0)[..., None].float()
    r = model.relative_positional_encoding(L, L, bsz=2)
    heads = lambda t: t.permute(2, 0, 1, 3)
    seg_mat = torch.nn.functional.one_hot(different.long(), 2).float()
    expected = theirs.rel_attn_core(heads(q), heads(k), heads(v), torch.einsum("ibh,hnd->ibnd", r, theirs.r), seg_mat=seg_mat, attn_mask=hidden)
    same = torch.einsum("bnid,nd->bni", q + theirs.r_s_bias[:, None], theirs.seg_embed[0] - theirs.seg_embed[1]) * theirs.scale
    got = fastlm.attention(q, k, v, position=ours, order=(ranks, ranks), group_bias=(same, segments, segments))
    torch.testing.assert_close(heads(got), expected, rtol=1e-4, atol=1e-5)


def test_shaw_matches_its_equations():
    scheme = Shaw(2, 8, reach=3)
    with torch.no_grad():
        scheme.key.normal_(), scheme.value.normal_()
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    rows = (torch.arange(9) - torch.arange(9)[:, None]).clamp(-3, 3) + 3
    p = ((q @ k.mT + torch.einsum("bhid,ijd->bhij", q, scheme.key[rows])) / 8**0.5).softmax(-1)
    expected = p @ v + torch.einsum("bhij,ijd->bhid", p, scheme.value[rows])
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
        from fastlm.model import ModelConfig, Transformer

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

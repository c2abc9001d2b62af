"""What DeBERTa has and transformers does not: the enhanced mask decoder, beside transformers' own last layer, the
discriminator's embedding, the convolution within documents.
"""

from dataclasses import replace

import pytest
import torch
from parity import spread

from fastlm import interop
from fastlm.models import ModelConfig, Transformer
from fastlm.models.deberta import DisentangledEmbedding
from fastlm.models.presets import preset

transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")

SIZES = dict(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
BOTH = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
V3 = BOTH | dict(position_buckets=8, max_relative_positions=20, norm_rel_ebd="layer_norm", share_att_key=True)


def real(padding, B, L):
    mask = torch.zeros(B, L, dtype=torch.long)
    for row, (start, end) in enumerate(padding):
        mask[row, start:end] = 1
    return mask


def test_parameters_are_counted_as_transformers_counts_them():
    """The base and the large models' own configs, on the meta device; positions of the mask decoder are ours alone."""
    released = dict(relative_attention=True, pos_att_type="c2p|p2c", position_biased_input=False)
    v2 = released | dict(position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True)
    sizes = lambda layers, dim, heads: dict(
        num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim
    )
    rows = {
        "deberta-base": ("deberta", released | sizes(12, 768, 12)),
        "deberta-xlarge": ("deberta", released | sizes(48, 1024, 16)),
        "deberta-v2-xxlarge": ("deberta-v2", v2 | sizes(48, 1536, 24) | dict(conv_kernel_size=3, conv_act="gelu")),
        "deberta-v3-base": ("deberta-v2", v2 | sizes(12, 768, 12)),
    }
    with torch.device("meta"):
        for name, (kind, options) in rows.items():
            config = transformers.AutoConfig.for_model(kind, **options)
            theirs = transformers.AutoModelForMaskedLM.from_config(config)
            ours = Transformer(preset(name, mask_decoder=False, head="lm"))
            assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters()), name


@pytest.mark.parametrize("padding", [None, [(0, 17), (0, 9)]], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["deberta", "deberta-v2"])
def test_the_mask_decoder_is_the_last_layer_twice(kind, padding):
    """transformers' own last layer, called as the released code's decoder calls it: queries of their own, which begin
    as the states below with positions added.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | (BOTH if kind == "deberta" else V3))
    theirs = transformers.AutoModelForMaskedLM.from_config(config).eval()
    spread(theirs)
    plain = interop.from_huggingface(theirs)
    ours = Transformer(replace(plain.config, mask_decoder=True)).eval()
    ours.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(1, 61, (2, 17))
    mask = torch.ones(2, 17, dtype=torch.int64) if padding is None else real(padding, 2, 17)
    with torch.no_grad():
        states = theirs.deberta(tokens, mask, output_hidden_states=True).hidden_states[-2]
        queries = states + ours.encoder.mask_decoder.position.weight[:17]
        rel = theirs.deberta.encoder.get_rel_embedding()
        layer = theirs.deberta.encoder.layer[-1]
        for _ in range(2):
            context = _their_attention(layer.attention.self, kind, queries, states, mask, rel)
            attended = layer.attention.output(context, queries)
            queries = layer.output(layer.intermediate(attended), attended)
        got = ours.states(tokens, attention_mask=mask)
        seen = mask.bool()
        torch.testing.assert_close(got[seen], queries[seen], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got[seen], plain.states(tokens, attention_mask=mask)[seen], atol=1e-2)


def _their_attention(attention, kind, queries, states, mask, rel):
    """Disentangled attention of queries to states. v1's query path does not run in transformers (it transposes rows of
    a batch), so its two projections' outputs are exchanged here: queries from one, keys and values from the other.
    """
    visible = mask.bool()[:, None, None] & mask.bool()[:, None, :, None]
    if kind == "deberta-v2":
        return attention(states, visible, query_states=queries, rel_embeddings=rel)[0]
    distance = torch.arange(17)[:, None] - torch.arange(17)
    by_head = lambda x: attention.in_proj(x).unflatten(-1, (4, 3, -1))
    exchanged = by_head(states).clone()
    exchanged[..., 0, :] = by_head(queries)[..., 0, :]
    hook = attention.in_proj.register_forward_hook(lambda module, given, out: exchanged.flatten(-3))
    context = attention(states, visible, relative_pos=distance[None], rel_embeddings=rel)[0]
    hook.remove()
    return context


def test_the_decoder_leaves_positions_out_of_the_layers_below():
    model = Transformer(preset("deberta", vocab_size=61, dim=24, layers=3, context=20)).eval()
    below = []
    model.encoder.blocks[1].register_forward_hook(lambda module, given, x: below.append(x))
    tokens = torch.randint(61, (1, 12))
    first = model(tokens)
    with torch.no_grad():
        model.encoder.mask_decoder.position.weight.normal_()
    assert not torch.allclose(model(tokens), first) and torch.equal(*below)


def test_a_discriminator_learns_the_difference_alone():
    torch.manual_seed(0)
    shape = dict(vocab_size=61, dim=24, layers=2, context=20)
    generator, discriminator = (Transformer(preset(n, **shape)) for n in ("deberta-v3-generator", "deberta-v3"))
    discriminator.embedding = DisentangledEmbedding(generator.embedding)
    tokens = torch.randint(61, (2, 12))
    assert torch.equal(discriminator.embedding(tokens), generator.embedding(tokens))
    assert "embedding.delta" in discriminator.state_dict() and len(list(discriminator.embedding.parameters())) == 1
    discriminator(tokens).square().sum().backward()
    assert generator.embedding.weight.grad is None and discriminator.embedding.delta.grad.any()
    with torch.no_grad():
        generator.embedding.weight.add_(1)
        discriminator.embedding.delta.add_(2)
    assert torch.equal(discriminator.embedding.weight, generator.embedding.weight + discriminator.embedding.delta)
    torch.testing.assert_close(discriminator.embedding(tokens), discriminator.embedding.weight[tokens])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kind="decoder", conv_width=3), "conv_width and mask_decoder are an encoder's, and kind is 'decoder'"),
        (dict(kind="encoder", conv_width=4), "conv_width is 4; give an odd number"),
        (dict(kind="encoder", mask_decoder=True, absolute_positions=True), "give mask_decoder=False"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_stays_within_documents(groups):
    """As wide as two tokens on either side, the documents as short as one."""
    shape = dict(vocab_size=61, dim=24, layers=2, context=20, conv_width=5, conv_groups=groups)
    model, tokens = Transformer(preset("deberta-v2", **shape)).eval(), torch.randint(61, (1, 12))
    spread(model)
    segments = torch.tensor([[0] * 5 + [1] + [2] * 6])
    packed = model(tokens, segments=segments)
    for span in (slice(0, 5), slice(5, 6), slice(6, 12)):
        torch.testing.assert_close(packed[:, span], model(tokens[:, span]), rtol=1e-4, atol=1e-5)

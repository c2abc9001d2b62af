"""The Transformer: every family with every scheme, padding, packing, sharing, initialisation, and no L×L tensor."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from largest import Largest

import fastlm
from fastlm.backends.dispatch import record_choices
from fastlm.models import ModelConfig, Transformer
from fastlm.models.init import INITS
from fastlm.models.presets import FAMILIES, preset
from fastlm.positions import SCHEMES

TINY = dict(vocab_size=97, dim=32, layers=2, heads=4, context=24)
DECODERS = sorted(name for name, c in FAMILIES.items() if c.kind == "decoder")
ENCODERS = sorted(name for name, c in FAMILIES.items() if c.kind == "encoder")
BOTH = sorted(name for name, c in FAMILIES.items() if c.kind == "encoder-decoder")


def tokens(B=2, L=24, seed=0):
    return torch.randint(97, (B, L), generator=torch.Generator().manual_seed(seed))


def tiny(name, **changes):
    """A family's own shape at its smallest, and what must be smaller with it."""
    own = FAMILIES[name]
    small = dict(
        kv_heads=None if own.kv_heads is None else 2,
        embedding_dim=None if own.embedding_dim is None else 16,
        windows=tuple(w and 7 for w in own.windows),
    )
    return replace(own, **TINY | small | changes)


def make(name="llama", **changes):
    torch.manual_seed(0)
    return Transformer(tiny(name, **changes)).eval()


def run(model, x, y=None, **options):
    """What a model makes of x; an encoder–decoder of x and y, which is x where it is not given."""
    return model(x, x if y is None else y, **options) if model.config.kind == "encoder-decoder" else model(x, **options)


@pytest.mark.parametrize("position", sorted(SCHEMES))
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_runs_with_every_scheme(name, position):
    """Forward and backward: each parameter has a gradient, but for heads that a loss on logits does not reach, and for
    what XLNet has for segments and for queries (test_xlnet.py).
    """
    if FAMILIES[name].two_streams and SCHEMES[position].embeds():
        with pytest.raises(ValueError, match="two_streams tell places apart in attention"):
            make(name, position=position, position_options={}, context=32)
        return
    model = make(name, position=position, position_options={}, context=32)
    out = run(model, tokens())
    assert out.shape == (2, 24) if model.config.head == "detection" else (2, 24, 97)
    out.float().square().sum().backward()
    for name, p in model.named_parameters():
        if name.startswith("pair_head") or "relative_segments" in name or "queries" in name:
            continue
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("position", sorted(SCHEMES))
@pytest.mark.parametrize("name", DECODERS + BOTH)
def test_decoding_in_pieces_is_decoding_whole(name, position):
    model, x = make(name, position=position, position_options={}), tokens()
    options = {} if model.encoder is None else {"memory": model.encode(tokens(seed=3))}
    read = lambda y, caches=None: (
        model(y, caches=caches) if model.encoder is None else model(None, y, caches=caches, **options)
    )
    caches = model.new_caches()
    with torch.no_grad():
        pieces = [read(x[:, a:b], caches) for a, b in ((0, 10), (10, 11), (11, 24))]
    torch.testing.assert_close(torch.cat(pieces, 1), read(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS + BOTH)
def test_the_future_is_invisible(name):
    model, changed = make(name), tokens()
    changed[:, 15:] = tokens(seed=9)[:, 15:]
    read = lambda y: model(y) if model.encoder is None else model(tokens(seed=3), y)
    assert torch.equal(read(tokens())[:, :15], read(changed)[:, :15])


@pytest.mark.parametrize("position", sorted(SCHEMES))
def test_the_future_is_invisible_to_every_scheme(position):
    model, changed = make(position=position), tokens()
    changed[:, 15:] = tokens(seed=9)[:, 15:]
    assert torch.equal(model(tokens())[:, :15], model(changed)[:, :15])


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_sees_both_ways(name):
    model, changed = make(name), tokens()
    changed[:, 20] = (changed[:, 20] + 1) % 97
    assert not torch.equal(model(tokens())[:, :15], model(changed)[:, :15])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_padding_is_as_if_it_were_not_there(name, side):
    """But that positions of families that do not skip padding count it."""
    model, x = make(name), tokens(1)
    real = torch.ones(1, 24, dtype=torch.bool)
    seen = slice(0, 17) if side == "right" else slice(7, 24)
    real[:, : 7 if side == "left" else 0] = False
    real[:, 17 if side == "right" else 24 :] = False
    padded = x.masked_fill(~real, 5)
    added = model.config.position == "learned" or model.config.mask_decoder
    absolute = added and not model.config.skip_padding and side == "left"
    y = tokens(1, 9, seed=4)
    if model.encoder is not None and model.decoder is not None:
        alone, both = model(x[:, seen], y), model(padded, y, attention_mask=real)
        kept = slice(None)
    else:
        options = {"positions": torch.arange(24)[seen]} if absolute else {}
        alone, both, kept = model(x[:, seen], **options), model(padded, attention_mask=real), seen
        absolute = False
    if not absolute:
        torch.testing.assert_close(both[:, kept], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_packed_documents_are_strangers(name):
    """Each as if it were alone, and blind to the other, down to the last bit."""
    model, packed = make(name), tokens(1, 24)
    segments = fastlm.masks.segments_from_cu_seqlens(torch.tensor([0, 9, 24], dtype=torch.int32), 24)
    options = {"segments": segments} | ({"decoder_segments": segments} if name in BOTH else {})
    out = run(model, packed, **options)
    for span in (slice(0, 9), slice(9, 24)):
        torch.testing.assert_close(out[:, span], run(model, packed[:, span]), rtol=1e-4, atol=1e-5)
        changed = tokens(1, 24, seed=9)
        changed[:, span] = packed[:, span]
        assert torch.equal(run(model, changed, **options)[:, span], out[:, span])


@pytest.mark.parametrize("position", sorted(SCHEMES))
def test_packed_documents_are_strangers_to_every_scheme(position):
    model, packed = make(position=position, kv_heads=2), tokens(1, 24)
    segments = fastlm.masks.segments_from_cu_seqlens(torch.tensor([0, 9, 24], dtype=torch.int32), 24)
    logits = model(packed, segments=segments)
    for span in (slice(0, 9), slice(9, 24)):
        torch.testing.assert_close(logits[:, span], model(packed[:, span]), rtol=1e-4, atol=1e-5)


def test_a_prefix_sees_itself():
    """Tokens of the prefix see one another, those after it see what came before."""
    model, prefix, changed = make(), torch.tensor([10, 10]), tokens()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    assert not torch.equal(model(tokens(), prefix=prefix)[:, :9], model(changed, prefix=prefix)[:, :9])
    changed = tokens()
    changed[:, 20] = (changed[:, 20] + 1) % 97
    assert torch.equal(model(tokens(), prefix=prefix)[:, :20], model(changed, prefix=prefix)[:, :20])


@pytest.mark.parametrize("name", sorted(n for n, c in FAMILIES.items() if c.head == "lm" and c.init != "t5"))
def test_initial_loss_is_ln_v(name):
    model = make(name, vocab_size=1024, dim=64)
    x = torch.randint(1024, (8, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = F.cross_entropy(run(model, x[:, :24]).flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() / math.log(1024) - 1) < 0.02


def test_initialisation_is_gpt2s():
    blocks = make("gpt", dim=256, layers=8, vocab_size=1000).decoder.blocks
    assert abs(blocks[0].mlp.inner.weight.std() / 0.02 - 1) < 0.05
    assert abs(blocks[0].mlp.out.weight.std() / (0.02 / 4) - 1) < 0.05
    assert not blocks[0].attention.qkv.bias.any()


def test_initialisation_is_t5s():
    """Queries have 1/√(dim · head width), for scores are not scaled; keys and values 1/√dim; embeddings 1."""
    model = make("t5", dim=256, heads=4, vocab_size=1000)
    q, k, _ = model.decoder.blocks[0].attention.qkv.weight.chunk(3)
    assert abs(q.std() * (256 * 64) ** 0.5 - 1) < 0.05 and abs(k.std() * 16 - 1) < 0.05
    assert abs(model.embedding.weight.std() - 1) < 0.05


@pytest.mark.parametrize("init", sorted(INITS))
def test_every_initialisation_draws_every_family(init):
    for name in ("gpt", "albert", "t5"):
        model = make(name, init=init, layers=4)
        assert all(p.isfinite().all() for p in model.parameters())
        assert run(model, tokens()).isfinite().all()


def test_depth_scaled_weights_shrink_and_t_fixups_shrink_with_all_layers():
    scaled = make("gpt", init="depth-scaled", dim=128, layers=4).decoder.blocks
    assert abs(scaled[3].mlp.inner.weight.std() / scaled[0].mlp.inner.weight.std() - 0.5) < 0.02
    fixed = make("gpt", init="t-fixup", dim=128, layers=4).decoder.blocks[0].mlp.inner.weight.std()
    plain = make("gpt", init="xavier", dim=128, layers=4).decoder.blocks[0].mlp.inner.weight.std()
    assert abs(fixed / plain - 36**-0.25) < 0.02


def test_shared_layers_are_one_layer():
    """ALBERT: two groups of two blocks each, which four layers pass in the order 0 0 1 1."""
    model = make("albert", layers=4, shared_groups=2, group_blocks=2)
    blocks = model.encoder.blocks
    assert len(blocks) == 4
    assert [list(blocks).index(block) for block in model.encoder.order()] == [0, 1, 0, 1, 2, 3, 2, 3]


def test_windows_take_turns():
    blocks = make("gpt3", layers=4, windows=(None, 3)).decoder.blocks
    assert [block.attention.window for block in blocks] == [None, 3, None, 3]


def test_token_types_and_a_pair_head():
    model = make("bert")
    types = torch.zeros(2, 24, dtype=torch.long)
    assert torch.equal(model(tokens()), model(tokens(), token_types=types))
    assert not torch.equal(model(tokens()), model(tokens(), token_types=types + 1))
    assert model.pair_head(model.states(tokens())).shape == (2, 2)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_nothing_is_l_by_l(name):
    """Forward and backward at L = 2048 make no tensor of L·L elements, and attention is computed by a fused kernel."""
    L = 2048
    model = make(name, context=L).train()
    with Largest() as largest, record_choices() as chosen:
        run(model, tokens(1, L)).float().square().sum().backward()
    assert largest.elements < L * L
    assert chosen["attention"] in ("cpp", "sdpa"), chosen


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(heads=3), "heads must divide dim; got dim 128, heads 3"),
        (dict(kv_heads=3), "kv_heads must divide heads"),
        (dict(position="rope2"), "position 'rope2' is unknown; choose from alibi"),
        (dict(layers=0), "layers is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(dim="64"), "dim is '64'; give a whole number of at least 1"),
        (dict(windows=(None, 2.5)), "windows is 2.5; give a whole number"),
        (dict(attention_scale="2"), "attention_scale is '2'; give a positive, finite number"),
        (dict(bias="no"), "bias is 'no'; give True or False"),
        (dict(dim=12, heads=4), "head_dim 3"),
        (dict(activation="swish"), "activation 'swish' is unknown; choose from gelu, gelu_tanh, relu, silu"),
        (dict(init="he"), "init 'he' is unknown; choose from bert"),
        (dict(kind="both"), "kind 'both' is unknown"),
        (dict(encoder_layers=2), "encoder_layers is for an encoder-decoder, and kind is 'decoder'"),
        (dict(embedding_dim=64), "a tied head reads states of embedding_dim 64, and dim is 128"),
        (dict(shared_groups=3), "shared_groups must divide layers; got 3 groups, 4 layers"),
        (dict(position_options={"scaling": {"kind": "linear"}}), "kind is 'linear'; choose from 'interpolate'"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    "name, call, message",
    [
        ("t5", lambda m: m(tokens()), "'encoder-decoder' takes decoder_tokens too"),
        ("gpt", lambda m: m(tokens(), tokens()), "'decoder' takes no decoder_tokens"),
        ("gpt", lambda m: m(tokens(), attention_mask=torch.ones(2, 9)), r"must be \[2, 24\]"),
        ("bert", lambda m: m.new_caches(), "an encoder sees all tokens at once"),
        ("bert", lambda m: m.generate(tokens(), 3), "an encoder writes no text"),
        ("gpt", lambda m: m.generate(tokens(), 3, beams=2), "goes past context 24"),
        ("gpt", lambda m: m.generate(tokens(), 3, top_p=0.0), r"top_p is 0.0; give a share"),
        ("t5", lambda m: m(tokens(), tokens(), segments=tokens()), "packed rows need segments of the encoder's"),
    ],
)
def test_calls_that_do_not_fit_are_refused(name, call, message):
    with pytest.raises(ValueError, match=message):
        call(make(name))


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset 'bret' is unknown; choose from albert"):
        preset("bret")


def test_schemes_belong_to_the_model_or_to_each_layer():
    assert make(position="t5").decoder.blocks[0].attention.position is None
    stack = make(position="shaw").decoder
    assert stack.position is None and stack.blocks[0].attention.position is not stack.blocks[1].attention.position


def test_the_attention_module_stands_alone():
    x = torch.randn(2, 9, 32, requires_grad=True)
    for position in ("t5", "alibi", None, fastlm.positions.RoPE(8)):
        block = fastlm.nn.Attention(32, 4, 2, position=position)
        block(x, key_lengths=torch.tensor([9, 4])).sum().backward()


def test_the_attention_module_hands_on_what_attention_takes():
    torch.manual_seed(0)
    x, ranks = torch.randn(2, 9, 32), torch.stack([torch.randperm(9) for _ in range(2)])
    block = fastlm.nn.Attention(32, 4, 2, position="alibi", window=(5, 1), dropout=0.3)
    q, k, v = block.qkv(x).unflatten(-1, (-1, 8)).transpose(1, 2).split((4, 2, 2), 1)
    given = dict(
        bias=torch.randn(1, 4, 9, 9),
        prefix=torch.tensor([3, 0]),
        order=(ranks, ranks),
        key_lengths=torch.tensor([9, 6]),
    )
    for i in range(len(given) + 1):
        some = dict(list(given.items())[:i])
        for dropout in (0.3, 0.0):
            torch.manual_seed(1)
            plain = fastlm.attention(
                q, k, v, position=block.position, causal=True, window=(5, 1), dropout=dropout, **some
            )
            torch.manual_seed(1)
            assert torch.equal(block.train(dropout > 0)(x, **some), block.out(plain.transpose(1, 2).flatten(2)))
    with pytest.raises(ValueError, match=r"dropout is 1.0; give a number in \[0, 1\)"):
        fastlm.nn.Attention(32, 4, dropout=1.0)
    with pytest.raises(ValueError, match="window left bound is -1"):
        fastlm.nn.Attention(32, 4, window=-1)
    with pytest.raises(ValueError, match="heads must divide dim"):
        fastlm.nn.Attention(30, 4)

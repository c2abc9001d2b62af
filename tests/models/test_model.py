"""The Transformer: shapes, initialisation, every scheme in every preset, decoding with a cache, and Hugging Face's own
models.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm import interop
from fastlm.models import ModelConfig, Transformer
from fastlm.models.presets import PRESETS, preset
from fastlm.positions import SCHEMES

TINY = dict(vocab_size=97, dim=32, layers=2, heads=4, context=24)


def tokens(B=2, L=24, seed=0):
    return torch.randint(97, (B, L), generator=torch.Generator().manual_seed(seed))


def make(name="llama", **changes):
    torch.manual_seed(0)
    return Transformer(preset(name, **TINY | changes)).eval()


@pytest.mark.parametrize("position", sorted(SCHEMES))
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_runs_with_every_scheme(name, position):
    model = make(name, position=position, kv_heads=2)
    full = model(tokens())
    assert full.shape == (2, 24, 97)
    caches = model.new_caches()
    pieces = [model(tokens()[:, a:b], caches) for a, b in ((0, 10), (10, 11), (11, 24))]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)
    F.cross_entropy(full.flatten(0, 1), tokens(seed=1).flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("position", sorted(SCHEMES))
def test_the_future_is_invisible(position):
    model = make(position=position)
    changed = tokens()
    changed[:, 15:] = tokens(seed=9)[:, 15:]
    assert torch.equal(model(tokens())[:, :15], model(changed)[:, :15])


@pytest.mark.parametrize("position", sorted(SCHEMES))
def test_packed_documents_are_strangers(position):
    """Each as if it were alone, and blind to the other, down to the last bit."""
    model, packed = make(position=position, kv_heads=2), tokens(1, 24)
    segments = fastlm.masks.segments_from_cu_seqlens(torch.tensor([0, 9, 24], dtype=torch.int32), 24)
    logits = model(packed, segments=segments)
    for span in (slice(0, 9), slice(9, 24)):
        torch.testing.assert_close(logits[:, span], model(packed[:, span]), rtol=1e-4, atol=1e-5)
        changed = tokens(1, 24, seed=9)
        changed[:, span] = packed[:, span]
        assert torch.equal(model(changed, segments=segments)[:, span], logits[:, span])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_initial_loss_is_ln_v(name):
    model = make(name, vocab_size=1024, dim=64)
    x = torch.randint(1024, (8, 25), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() / math.log(1024) - 1) < 0.02


def test_initialisation_is_gpt2s():
    model = make("gpt", dim=256, layers=8, vocab_size=1000)
    assert abs(model.blocks[0].mlp.inner.weight.std() / 0.02 - 1) < 0.05
    assert abs(model.blocks[0].mlp.out.weight.std() / (0.02 / 4) - 1) < 0.05
    assert not model.blocks[0].attention.qkv.bias.any()


def test_parameter_count_of_gpt2():
    assert (
        Transformer(preset("gpt", vocab_size=50257, dim=768, layers=12, heads=12, context=1024)).parameter_count()
        == 124_439_808
    )


def test_generate():
    model = make()
    greedy = model.generate(tokens(1, 5), 40, temperature=0.0)
    assert greedy.shape == (1, 45) and torch.equal(greedy[:, :5], tokens(1, 5))
    draw = lambda: model.generate(tokens(1, 5), 10, generator=torch.Generator().manual_seed(4))
    assert torch.equal(draw(), draw())
    assert torch.equal(greedy[:, 5], model(tokens(1, 5))[:, -1].argmax(-1))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(heads=3), "heads must divide dim; got dim 128, heads 3"),
        (dict(kv_heads=3), "kv_heads must divide heads"),
        (dict(position="rope2"), "position 'rope2' is unknown; choose from alibi"),
        (dict(layers=0), "layers is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(dim=12, heads=4), "head_dim 3"),
        (dict(mlp="relu"), "mlp 'relu' is unknown; choose from gelu, swiglu"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset 'bret' is unknown; choose from gpt, llama"):
        preset("bret")


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

SHAPES = [
    ("llama", {}, "llama"),
    ("llama", dict(kv_heads=2, tie_embeddings=False), "llama"),
    ("gpt", {}, "gpt2"),
    ("gpt", dict(position="t5"), "fastlm"),
]


@pytest.mark.parametrize("name, changes, kind", SHAPES, ids=str)
def test_saved_models_come_back(tmp_path, name, changes, kind):
    model = make(name, **changes)
    assert interop.save_pretrained(model, tmp_path) == kind
    assert torch.equal(interop.load_pretrained(tmp_path)(tokens()), model(tokens()))


@pytest.mark.parametrize("implementation", ["eager", "fastlm"])
@pytest.mark.parametrize("name, changes, kind", SHAPES[:3], ids=str)
def test_transformers_opens_them_and_agrees(tmp_path, name, changes, kind, implementation):
    transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")
    interop.register()
    model = make(name, **changes)
    interop.save_pretrained(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=implementation, output_loading_info=True
    )
    assert not any(report.values())
    transformers.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()), rtol=1e-5, atol=1e-5)
    padded = torch.ones(2, 24, dtype=torch.long)
    padded[1, 15:] = 0
    torch.testing.assert_close(
        theirs(tokens(), attention_mask=padded).logits[1, :15], model(tokens())[1, :15], rtol=1e-5, atol=1e-5
    )
    generated = theirs.generate(tokens()[:, :6], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, model.generate(tokens()[:, :6], 5, temperature=0.0))


def test_a_folder_that_is_not_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json"):
        interop.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="has no 'fastlm' entry"):
        interop.load_pretrained(tmp_path)


def test_schemes_belong_to_the_model_or_to_each_layer():
    assert make(position="t5").blocks[0].attention.position is None
    model = make(position="shaw")
    assert model.position is None and model.blocks[0].attention.position is not model.blocks[1].attention.position


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

"""Writing text: the tokens that transformers writes with the same weights, greedily and by beam search, for prompts of
one length and of several; sampling within its bounds.
"""

import pytest
import torch

from fastlm import interop
from fastlm.models import Transformer
from fastlm.models.presets import preset

SIZES = dict(vocab_size=97)
PAD, NEW = 96, 64


def theirs(kind: str):
    """A tiny model of transformers whose weights are wide enough for texts that differ, and end here and there."""
    transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")
    shape = {
        "GPT2": dict(n_positions=128, n_embd=32, n_layer=2, n_head=4),
        "Llama": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=128),
        "Bloom": dict(hidden_size=32, n_layer=2, n_head=4),
        "Bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, activation_dropout=0.0,
                     decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
                     forced_eos_token_id=None, decoder_start_token_id=PAD),
        "T5": dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=PAD),
    }[kind]  # fmt: skip
    tokens = dict(eos_token_id=3, bos_token_id=2, pad_token_id=PAD)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **tokens, **shape)
    head = {"GPT2": "LMHeadModel", "Bart": "ForConditionalGeneration", "T5": "ForConditionalGeneration"}
    torch.manual_seed(0)
    model = getattr(transformers, kind + head.get(kind, "ForCausalLM"))(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 and kind != "T5" else 1)
    return model


@pytest.mark.parametrize("padded", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Bloom", "Bart", "T5"])
def test_tokens_are_those_of_transformers(kind, padded):
    model = theirs(kind)
    ours = interop.from_huggingface(model)
    x = torch.randint(4, 90, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x)
    if padded:
        mask[0, :4], mask[2, :7] = 0, 0
        x = x.masked_fill(mask == 0, PAD)
    both = ours.encoder is not None
    first = model.generate(x, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    eos = int(first[0, 9 if both else x.shape[1] + 9])  # one that is met
    for beams, penalty in ((1, 1.0), (2, 1.0), (4, 0.0), (4, -1.0)):
        expected = model.generate(
            x, attention_mask=mask, max_new_tokens=NEW, do_sample=False, num_beams=beams, length_penalty=penalty,
            eos_token_id=eos,
        )  # fmt: skip
        got = ours.generate(
            x, NEW, 0.0, attention_mask=mask, beams=beams, length_penalty=penalty, eos=eos, pad=PAD, start=PAD
        )
        assert torch.equal(got, expected[:, 1:] if both else expected), (beams, penalty)


def test_sampling_keeps_to_the_likeliest():
    torch.manual_seed(0)
    model = Transformer(preset("gpt", vocab_size=97, dim=32, layers=1, heads=2)).eval()
    x = torch.randint(97, (1, 5))
    likely = model(x)[0, -1].float().softmax(-1).sort(descending=True)
    draw = lambda **bounds: {
        int(model.generate(x, 1, generator=torch.Generator().manual_seed(i), **bounds)[0, -1]) for i in range(60)
    }
    assert draw(top_k=3) <= set(likely.indices[:3].tolist()) and len(draw(top_k=3)) == 3
    enough = int((likely.values.cumsum(0) < 0.2).sum()) + 1
    assert draw(top_p=0.2) <= set(likely.indices[:enough].tolist())
    assert draw(top_k=1) == {int(likely.indices[0])} == draw(temperature=0.0)


def test_a_text_goes_on_past_its_context_and_is_told_token_by_token():
    torch.manual_seed(0)
    model = Transformer(preset("gpt", vocab_size=97, dim=32, layers=1, heads=2, context=16)).eval()
    told = []
    out = model.generate(torch.randint(97, (2, 5)), 40, temperature=0.0, on_token=told.append)
    assert out.shape == (2, 45) and torch.equal(torch.stack(told, 1), out[:, 5:])


def test_any_of_several_tokens_ends_a_text():
    torch.manual_seed(0)
    model = Transformer(preset("gpt", vocab_size=97, dim=32, layers=1, heads=2)).eval()
    x = torch.randint(97, (1, 5))
    free = model.generate(x, 8, temperature=0.0)[0, 5:].tolist()
    first = min(free.index(token) for token in (free[3], free[5]))
    for beams in (1, 2):
        alone = model.generate(x, 8, temperature=0.0, eos=[free[3]], beams=beams)
        assert torch.equal(alone, model.generate(x, 8, temperature=0.0, eos=free[3], beams=beams))
    assert model.generate(x, 8, temperature=0.0, eos=[free[5], free[3]]).shape[1] == 5 + first + 1


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_what_does_not_fit_is_refused(kind):
    model = Transformer(preset(kind, vocab_size=97, dim=32, layers=1, heads=2)).eval()
    x = torch.zeros(2, 8, dtype=torch.int64)
    for shape in ((2, 5), (2, 10), (1, 8), (2, 3)):
        with pytest.raises(ValueError, match=r"attention_mask must be \[2, 8\] bool or int, as the tokens are; got"):
            model.generate(x, 4, attention_mask=torch.ones(shape, dtype=torch.int64))
    for mask in (torch.zeros(2, 8), [[1] * 8] * 2):  # additive masks are floats
        with pytest.raises(ValueError, match="attention_mask must be"):
            model.generate(x, 4, attention_mask=mask)
    for tokens in (x[0], x[:, :0], x.float(), x.tolist()):
        with pytest.raises(ValueError, match=r"tokens must be \[B, L\] int64"):
            model.generate(tokens, 4)
    for name in ("eos", "pad", "start"):
        for token in ("a", 97, -1, 1.0):
            with pytest.raises(ValueError, match=f"{name} is .*; give a token of the vocabulary, from 0 to 96"):
                model.generate(x, 4, **{name: token})
    for options in (dict(length_penalty="a"), dict(temperature=1e-45), dict(beams=0), dict(top_k=0), dict(top_p=0.0)):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
            model.generate(x, 4, **options)

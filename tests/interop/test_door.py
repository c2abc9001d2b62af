"""The door for attention: who is refused, when and in which words; what a Mask answers; padding, caches, gradients,
checkpoints and torch.compile.
"""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from families import BEFORE_5, KINDS, make, padded, served, tiny, tokens, transformers

import fastlm.interop
from fastlm.interop.attention import Mask, _mask

REFUSED = "attn_implementation='fastlm' cannot serve {}, which computes attention itself .*'sdpa' or 'eager'"
MISUSED = "attn_implementation='fastlm' cannot serve this model, which computes with its mask itself"
causal_mask_function = transformers.masking_utils.causal_mask_function


@pytest.fixture(autouse=True)
def registered():
    fastlm.interop.register()


# ---------------------------------------------------------------------------------------------------------------------
# Models that compute attention themselves


@pytest.mark.parametrize("name", ["bloom", "xlnet"])
def test_refused_by_name_from_every_door(tmp_path, name):
    model = KINDS["causal"][0].from_config(tiny(name))
    words = REFUSED.format(type(model).__name__)
    with pytest.raises(NotImplementedError, match=words):
        model.set_attn_implementation("fastlm")
    with pytest.raises(NotImplementedError, match=words):
        model.set_attn_implementation(attn_implementation="fastlm")
    assert model.config._attn_implementation != "fastlm"
    model.save_pretrained(tmp_path)
    for load in (KINDS["causal"][0].from_pretrained, type(model).from_pretrained):
        with pytest.raises(NotImplementedError, match=words):
            load(tmp_path, attn_implementation="fastlm")
        load(tmp_path)
    config = tiny(name)
    config._attn_implementation = "fastlm"
    with pytest.raises(NotImplementedError, match=words):
        type(model)(config)


def test_one_who_extends_them_is_refused():
    class Mine(transformers.DebertaV2Model):
        pass

    config = tiny("deberta-v2")
    config._attn_implementation = "fastlm"
    with pytest.raises(NotImplementedError, match=REFUSED.format("Mine")):
        Mine(config)


def test_source_that_cannot_be_read_speaks_for_nobody(monkeypatch):
    class Mine(transformers.LlamaModel):
        pass

    monkeypatch.delitem(sys.modules, Mine.__module__)  # as a notebook's cells
    config = tiny("llama")
    config._attn_implementation = "fastlm"
    Mine(config)


def test_a_part_that_computes_attention_itself_is_refused():
    text, vision = tiny("bloom"), tiny("clip_vision_model")
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    with pytest.raises(NotImplementedError, match=REFUSED.format("BloomModel")):
        transformers.AutoModel.from_config(config, attn_implementation="fastlm")


def test_one_who_serves_changes_his_mind():
    model = make("causal", "llama", "eager")
    want = model(tokens()).logits
    fastlm.interop.register()  # twice is once
    model.set_attn_implementation("fastlm")
    assert model.config._attn_implementation == "fastlm"
    torch.testing.assert_close(model(tokens()).logits, want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# A mask that others cannot read

SCORES = torch.zeros(1, 2, 4, 4)
USES = {
    "slice": lambda mask: mask[:, :, :, :4],
    "to": lambda mask: mask.to(torch.float32),
    "dtype": lambda mask: mask.dtype,
    "shape": lambda mask: mask.shape[-1],
    "added": lambda mask: SCORES + mask,
    "adding": lambda mask: mask + SCORES,
    "in place": lambda mask: SCORES.clone().add_(mask),
    "inverted": lambda mask: 1.0 - mask,
    "scaled": lambda mask: mask * -1e4,
    "negated": lambda mask: ~mask,
    "compared": lambda mask: mask == 0,
    "asked": lambda mask: 0 if mask else 1,
    "where": lambda mask: torch.where(mask, SCORES, -1e4),
    "masked_fill": lambda mask: SCORES.masked_fill(mask, -1e4),
    "sdpa": lambda mask: F.scaled_dot_product_attention(SCORES, SCORES, SCORES, attn_mask=mask),
    "cat": lambda mask: torch.cat([mask, SCORES]),
    "function": lambda mask: torch.logical_not(mask),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("padding", [None, torch.ones(1, 4, dtype=torch.bool)], ids=["without", "with padding"])
def test_every_use_of_a_mask_is_refused(use, padding):
    mask = _mask(1, 4, 4, mask_function=causal_mask_function, attention_mask=padding)
    assert isinstance(mask, Mask)  # never None: that is no mask
    with pytest.raises((NotImplementedError, AttributeError), match=MISUSED):
        use(mask)


def test_what_carries_a_mask_about_may():
    mask = _mask(1, 4, 4, mask_function=causal_mask_function)
    assert mask is not None and not isinstance(mask, torch.Tensor) and not hasattr(mask, "to")
    assert copy.deepcopy(mask).lengths == mask.lengths == (4, 4)


def test_transformers_before_5_says_where_queries_stand():
    where = torch.arange(3, 5)
    assert _mask(1, 5, cache_position=where, mask_function=causal_mask_function).lengths == (2, 5)
    assert _mask(1, 8, cache_position=where, mask_function=causal_mask_function).seen["offset"] == 3


def dense(mask, B, H=1):
    """[B, Lq, Lk]: what attention shows of each key under a Mask."""
    Lq, Lk = mask.lengths
    values = torch.eye(Lk).expand(B, H, -1, -1)
    flat = torch.zeros(B, H, Lk, Lk)
    return fastlm.attention(flat[:, :, :Lq], flat, values, **mask.seen)[:, 0] > 0


CHUNKS = torch.tensor([0, 2])  # padding on the left of each row
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1]])
RESTART = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
theirs = transformers.masking_utils
FUNCTIONS = {
    "causal": lambda: causal_mask_function,
    "bidirectional": lambda: theirs.bidirectional_mask_function,
    "window": lambda: theirs.sliding_window_causal_mask_function(3),
    "window of one": lambda: theirs.sliding_window_causal_mask_function(1),
    "both sides": lambda: theirs.sliding_window_bidirectional_mask_function(2),
    "chunks": lambda: theirs.chunked_causal_mask_function(3, CHUNKS),
    "packed": lambda: theirs.and_masks(causal_mask_function, theirs.packed_sequence_mask_function(PACKED)),
    "packed, restarted": lambda: packed(causal_mask_function),
    "packed, window": lambda: packed(theirs.sliding_window_causal_mask_function(2)),
    "packed, chunks": lambda: packed(theirs.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long))),
}


def packed(function):
    return theirs.packed_sequence_compatibility_function(function, RESTART, PACKED)


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_function_is_read_as_it_computes(name, padding):
    """Every pair, and of a query that sees nothing nothing; with all queries, the last ones, and a longer cache."""
    try:
        L, function = 8, FUNCTIONS[name]()
    except AttributeError as error:
        pytest.skip(f"this transformers has none: {error}")
    real = {
        "none": None,
        "left": torch.arange(L) >= CHUNKS[:, None],
        "right": torch.arange(L) < L - CHUNKS[:, None],
        "holes": torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 1, 1]]).bool(),
    }[padding]
    rows = torch.arange(2)[:, None, None]
    cuts = [(L, 0, L, 0)] if "packed" in name else [(L, 0, L, 0), (2, 6, L, 0), (3, 5, 6, 2), (3, 2, L, 0)]
    for Lq, q_offset, Lk, kv_offset in cuts:
        queries, keys = q_offset + torch.arange(Lq)[None, :, None], kv_offset + torch.arange(Lk)[None, None]
        want = function(rows, 0, queries, keys).expand(2, Lq, Lk)
        want = want if real is None else want & real[:, None, kv_offset : kv_offset + Lk]
        mask = _mask(2, Lk, Lq, q_offset, kv_offset, mask_function=function, attention_mask=real)
        assert torch.equal(dense(mask, 2), want), (Lq, q_offset, Lk, kv_offset)


def test_a_mask_function_of_ones_own_is_refused_by_name():
    def mine(row, head, query, key):
        return key <= query

    both = theirs.and_masks(mine, causal_mask_function)
    for function, name in ((mine, "test_door.test_a_mask.*mine"), (both, "masking_utils.and_masks")):
        with pytest.raises(NotImplementedError, match=f"serves no mask made by .*{name}"):
            _mask(1, 4, 4, mask_function=function)


# ---------------------------------------------------------------------------------------------------------------------
# What is served


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "kind, name",
    [("causal", "llama"), ("causal", "gpt2"), ("causal", "gemma2"), ("masked", "bert"), ("seq2seq", "t5")],
)
def test_gradients_with_padding(kind, name, side):
    mask, gradients = padded(side), []
    for implementation in ("eager", "fastlm"):
        with served():
            model = make(kind, name, implementation).train()
        given = {"decoder_input_ids": tokens()[:, :5]} if kind == "seq2seq" else {}
        logits = model(input_ids=tokens(), attention_mask=mask, **given)[0]
        assert logits.isfinite().all()
        real = logits if kind == "seq2seq" else logits[mask.bool()]
        real.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    largest = max(g.abs().max() for g in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * largest.item())


@pytest.mark.parametrize(
    "kind, name",
    [("causal", "llama"), ("causal", "opt"), ("causal", "gemma2"), ("seq2seq", "t5"), ("seq2seq", "bart")],
)
def test_prompts_of_several_lengths_are_continued(kind, name):
    given = dict(attention_mask=padded("left"), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    given |= {"decoder_start_token_id": 1} if kind == "seq2seq" else {}
    given |= dict(return_dict_in_generate=True, output_logits=True)
    with served():
        want, got = (make(kind, name, by).generate(tokens(), **given).logits for by in ("eager", "fastlm"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text"])
def test_every_cache_goes_on(name, cache):
    """Windows are shorter than the text, so that a cache forgets."""
    given = dict(attention_mask=padded("left"), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    given |= dict(return_dict_in_generate=True, output_logits=True, cache_implementation=cache, disable_compile=True)
    want, got = (make("causal", name, by).generate(tokens(), **given).logits for by in ("eager", "fastlm"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_packed_rows_are_as_each_alone(name):
    """As DataCollatorWithFlattening packs them: positions start over."""
    model, ids = make("causal", name, "fastlm"), tokens()[:1]
    position_ids = torch.cat([torch.arange(5), torch.arange(4), torch.arange(3)])[None]
    packed = model(ids, position_ids=position_ids, use_cache=False).logits
    alone = [model(each, use_cache=False).logits for each in ids.split([5, 4, 3], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mistral"])
def test_gradients_of_sinks_windows_and_other_widths(name):
    gradients = []
    for implementation in ("eager", "fastlm"):
        model = make("causal", name, implementation)
        model(tokens(), attention_mask=padded("right"), use_cache=False).logits[
            padded("right").bool()
        ].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(g.abs().max() for g in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * largest.item())


def test_the_other_rows_padding_changes_nothing():
    """Whatever stands in padding, what is real has the same bits."""
    model, mask = make("causal", "llama", "fastlm"), padded("left")
    other = torch.where(mask.bool(), tokens(), 7)
    want, got = (model(ids, attention_mask=mask).logits[mask.bool()] for ids in (tokens(), other))
    assert torch.equal(got, want)


def test_a_cache_goes_on_in_pieces():
    model, mask = make("causal", "llama", "fastlm"), padded("left")
    want = model(tokens(), attention_mask=mask).logits
    first = model(tokens()[:, :8], attention_mask=mask[:, :8], use_cache=True)
    rest = model(tokens()[:, 8:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1)[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"must tell of all keys, .*\[2, 16\]; got \[2, 4\]"):
        model(tokens()[:, :4], attention_mask=mask[:, :4], past_key_values=first.past_key_values)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, gradients = make("causal", "llama", "fastlm").train(), []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(tokens(), attention_mask=padded("left"), use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(BEFORE_5, reason="where queries stand is in a tensor, which torch.compile does not read")
def test_torch_compile_in_one_graph():
    model = make("causal", "llama", "fastlm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for side in ("left", "right"):
        want, got = (f(tokens(), attention_mask=padded(side), use_cache=False).logits for f in (model, compiled))
        torch.testing.assert_close(got[padded(side).bool()], want[padded(side).bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(BEFORE_5, reason="where queries stand is in a tensor, which torch.compile does not read")
def test_torch_compile_in_several_graphs_where_the_mask_is_read():
    model, given = make("causal", "mistral", "fastlm"), dict(position_ids=torch.arange(12)[None] % 5, use_cache=False)
    got = torch.compile(model, backend="aot_eager")(tokens()[:1], **given).logits
    torch.testing.assert_close(got, model(tokens()[:1], **given).logits, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(tokens()[:1], **given)


def test_layers_that_accelerate_moves():
    hooks = pytest.importorskip("accelerate", reason="pip install '.[test]'").hooks
    model = make("causal", "llama", "fastlm")
    want = model(tokens(), attention_mask=padded("left")).logits
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.self_attn, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(model(tokens(), attention_mask=padded("left")).logits, want)


def test_pictures_and_sound():
    pixels, mels = torch.randn(2, 3, 16, 16), torch.randn(2, 8, 24)
    vit = dict(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    whisper = dict(
        vocab_size=97, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=12,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    for config, given in (
        (transformers.ViTConfig(**vit), dict(pixel_values=pixels)),
        (transformers.WhisperConfig(**whisper), dict(input_features=mels, decoder_input_ids=tokens()[:, :5])),
    ):
        model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
        want = model(**given)[0]
        model.set_attn_implementation("fastlm")
        torch.testing.assert_close(model(**given)[0], want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is not


def test_what_is_not_served_is_refused_in_words():
    model = make("causal", "llama", "fastlm")
    with pytest.raises(NotImplementedError, match=r"takes no dense mask; got one of shape \[2, 1, 12, 12\]"):
        model(tokens(), attention_mask=torch.zeros(2, 1, 12, 12))
    with pytest.raises(NotImplementedError, match="does not serve output_attentions yet"):
        model(tokens(), output_attentions=True)

"""What directories and configs may be like: ours there and back, shards, old names, and refusals that name what is
wrong.
"""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from checkpoints import CHECKPOINTS, transformers
from safetensors.torch import load_file, save_file

from fastlm import interop
from fastlm.interop.family import resolved
from fastlm.models import ModelConfig, Transformer
from fastlm.models.presets import FAMILIES

TINY = dict(vocab_size=97, dim=32, layers=2, heads=4, context=24)
SAVED_AS = {
    "gpt": "gpt2", "gpt3": "fastlm", "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "bloom": "bloom",
    "mpt": "mpt", "transformer-xl": "fastlm", "bert": "bert", "roberta": "roberta", "albert": "albert",
    "electra": "electra", "electra-generator": "electra", "xlnet": "xlnet", "deberta": "deberta",
    "deberta-v2": "deberta-v2", "deberta-v3": "fastlm", "deberta-v3-generator": "deberta-v2", "bart": "bart",
    "mass": "fastlm", "t5": "t5", "t5-v1.1": "t5",
}  # fmt: skip


RELEASED = {  # DeBERTa's head, as its authors named it and transformers does where legacy is False
    f"cls.predictions.{theirs}": f"lm_predictions.lm_head.{name}"
    for theirs, name in {
        "transform.dense.weight": "dense.weight", "transform.dense.bias": "dense.bias", "bias": "bias",
        "transform.LayerNorm.weight": "LayerNorm.weight", "transform.LayerNorm.bias": "LayerNorm.bias",
    }.items()
}  # fmt: skip


def tiny(name: str, **changes) -> Transformer:
    own = FAMILIES[name]
    small = dict(embedding_dim=None if own.embedding_dim is None else 16, windows=tuple(w and 7 for w in own.windows))
    torch.manual_seed(0)
    return Transformer(replace(own, **TINY | small | changes)).eval()


def tokens(B=2, L=24) -> torch.Tensor:
    return torch.randint(97, (B, L), generator=torch.Generator().manual_seed(0))


def checkpoint(architecture: str) -> torch.nn.Module:
    return next(checkpoint for checkpoint in CHECKPOINTS if checkpoint.architecture == architecture).make()


def changed(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# ---------------------------------------------------------------------------------------------------------------------
# Ours


@pytest.mark.parametrize("name", SAVED_AS)
def test_families_come_back_bit_for_bit(tmp_path, name):
    model = tiny(name)
    unread = pytest.warns(UserWarning, match="transformers does not compute the enhanced mask decoder")
    with unread if model.config.mask_decoder else nullcontext():
        assert interop.to_huggingface(model, tmp_path) == interop.model_type(model.config) == SAVED_AS[name]
    back = interop.from_huggingface(tmp_path)
    assert resolved(back.config) == resolved(model.config) and not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad for p in back.parameters())
    assert back.parameter_count() == model.parameter_count()  # tied matrices are one


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gpt", dict(position="t5")),
        ("gpt", dict(norm="rmsnorm")),
        ("llama", dict(position_options={"layout": "interleaved"})),
        ("llama", dict(position_options={"scaling": {"kind": "ntk", "factor": 2.0}})),
        ("llama", dict(dropout=0.1)),
        ("bert", dict(token_types=0)),
        ("bert", dict(pair_labels=3)),
        ("albert", dict(embedding_dim=32)),
        ("t5", dict(scale_logits=False, tie_embeddings=True, windows=(8,))),
        ("bart", dict(head_bias=False)),
    ],
)
def test_what_transformers_has_no_model_for_is_ours(tmp_path, name, changes):
    model = tiny(name, **changes)
    assert interop.to_huggingface(model, tmp_path) == "fastlm"
    assert interop.from_huggingface(tmp_path).config == model.config


@pytest.mark.parametrize("implementation", ["eager", "fastlm"])
@pytest.mark.parametrize("name, changes", [("llama", dict(kv_heads=2, tie_embeddings=False)), ("gpt", {})], ids=str)
def test_transformers_generates_the_same(tmp_path, name, changes, implementation):
    interop.register()
    model = tiny(name, **changes)
    interop.to_huggingface(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    generated = theirs.generate(tokens()[:, :6], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, model.generate(tokens()[:, :6], 5, temperature=0.0))


def test_entries_go_into_the_config_and_may_not_contradict_it(tmp_path):
    interop.to_huggingface(tiny("roberta"), tmp_path, eos_token_id=5, pad_token_id=1)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["eos_token_id"] == 5 and written["torch_dtype"] == "float32"
    with pytest.raises(ValueError, match="pad_token_id is 0, and a roberta of this shape has 1"):
        interop.to_huggingface(tiny("roberta"), tmp_path, pad_token_id=0)


# ---------------------------------------------------------------------------------------------------------------------
# Theirs, in forms that files have


def test_shards(tmp_path):
    model = checkpoint("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    x = tokens() % 61
    with torch.no_grad():
        torch.testing.assert_close(interop.from_huggingface(tmp_path)(x), model(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "architecture, rename, more",
    [
        ("GPT2LMHeadModel", lambda name: name.removeprefix("transformer."), ["h.0.attn.bias", "h.0.attn.masked_bias"]),
        ("BertForPreTraining", lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"), []),
        ("BertForPreTraining", lambda name: name.replace("LayerNorm.bias", "LayerNorm.beta"), []),
        ("BertForPreTraining", lambda name: name, ["bert.embeddings.position_ids"]),
        ("BertForPreTraining", lambda name: name.replace("cls.predictions.bias", "cls.predictions.decoder.bias"), []),
        ("T5ForConditionalGeneration", lambda name: name.replace("shared", "decoder.embed_tokens"), []),
        ("T5ForConditionalGeneration", lambda name: name.replace("shared", "lm_head"), []),
        ("LlamaForCausalLM", lambda name: name, ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("DebertaForMaskedLM", lambda name: RELEASED.get(name, name), ["deberta.embeddings.position_ids"]),
        ("DebertaV2ForMaskedLM", lambda name: RELEASED.get(name, name), []),
    ],
)
def test_names_that_older_files_have(tmp_path, architecture, rename, more):
    model = checkpoint(architecture)
    model.save_pretrained(tmp_path)
    saved = {rename(name): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    save_file(saved | {name: torch.zeros(2) for name in more}, tmp_path / "model.safetensors")
    want, got = interop.from_huggingface(model), interop.from_huggingface(tmp_path)
    assert got.config == want.config
    assert all(torch.equal(x, got.state_dict()[name]) for name, x in want.state_dict().items())


def test_blooms_first_configs(tmp_path):
    model = checkpoint("BloomForCausalLM")
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    old = {"n_embed": entries.pop("hidden_size"), "num_attention_heads": entries.pop("n_head"), "offset_alibi": 100}
    (tmp_path / "config.json").write_text(json.dumps(entries | old))
    assert interop.from_huggingface(tmp_path).config == interop.from_huggingface(model).config


def test_debertas_released_files(tmp_path):
    """Positions of the mask decoder, and v3's discriminator's head, which transformers leaves unread."""
    model = checkpoint("DebertaV2ForMaskedLM")
    model.save_pretrained(tmp_path)
    saved = {RELEASED.get(name, name): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    positions = torch.randn(model.config.max_position_embeddings, model.config.hidden_size)
    saved |= {"deberta.embeddings.position_embeddings.weight": positions, "mask_predictions.dense.bias": torch.zeros(2)}
    save_file(saved, tmp_path / "model.safetensors")
    changed(tmp_path, architectures=None)
    with pytest.warns(UserWarning, match=r"mask_predictions.dense.bias .* left out"):
        ours = interop.from_huggingface(tmp_path)
    assert ours.config == replace(interop.from_huggingface(model).config, mask_decoder=True)
    assert torch.equal(ours.encoder.mask_decoder.position.weight, positions)


def test_a_head_that_ties_whatever_its_config_says():
    config = checkpoint("DebertaForMaskedLM").config
    config.update(dict(legacy=False, tie_word_embeddings=False))
    model = transformers.DebertaForMaskedLM(config).eval()
    ours = interop.from_huggingface(model)
    assert ours.head.weight is ours.embedding.weight
    x = tokens(L=16) % 61
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "RobertaForMaskedLM", "AlbertForPreTraining"])
def test_heads_are_those_that_tensors_show(tmp_path, architecture):
    """Of a config that does not say which."""
    model = checkpoint(architecture)
    model.save_pretrained(tmp_path)
    pairs = 2 if architecture.endswith("PreTraining") else 0
    changed(tmp_path, architectures=None)
    assert interop.from_huggingface(tmp_path).pair_head is None or pairs
    base = getattr(model, model.base_model_prefix)
    base.save_pretrained(tmp_path)
    changed(tmp_path, architectures=None)
    config = interop.from_huggingface(tmp_path).config
    assert (config.head, config.pair_labels, config.pooler) == ("none", 0, bool(pairs))


def test_weights_are_copied_in_their_dtype():
    model = checkpoint("GPT2LMHeadModel").bfloat16()
    mine = interop.from_huggingface(model)
    assert {p.dtype for p in mine.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert mine.embedding.weight.any() and mine.head.weight is mine.embedding.weight


def test_an_unknown_entry_is_named_once(tmp_path):
    checkpoint("GPT2LMHeadModel").save_pretrained(tmp_path)
    changed(tmp_path, n_wings=2, colour="red")
    with pytest.warns(UserWarning, match="fastlm does not know colour, n_wings of gpt2's config") as warned:
        interop.from_huggingface(tmp_path)
    assert len(warned) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "architecture, entries, words",
    [
        ("GPT2LMHeadModel", dict(model_type="gpt5"), "model_type 'gpt5'; fastlm knows albert, bart, bert, bloom"),
        ("GPT2LMHeadModel", dict(scale_attn_by_inverse_layer_idx=True), "gpt2's config has scale_attn_by_inverse_lay"),
        ("GPT2LMHeadModel", dict(activation_function="mish"), "activation_function 'mish', which .*: the activations"),
        ("GPT2LMHeadModel", dict(quantization_config={"bits": 4}), r"quantization_config {'bits': 4}"),
        ("LlamaForCausalLM", dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
        ("LlamaForCausalLM", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (
            "LlamaForCausalLM",
            dict(rope_parameters={"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}),
            r"rope_parameters\['attention_factor'\] 3.0, .*: YaRN as published has 1.069",
        ),
        ("MptForCausalLM", dict(attn_config={"clip_qkv": 6.0}), r"attn_config\['clip_qkv'\] 6.0"),
        ("MptForCausalLM", dict(no_bias=False), "no_bias False"),
        ("BertForPreTraining", dict(position_embedding_type="relative_key"), "position_embedding_type 'relative_key'"),
        ("BertForPreTraining", dict(is_decoder=True), "is_decoder True, .* ours has False; open it with transformers"),
        ("AlbertForPreTraining", dict(embedding_size=24), "embedding_size 24"),
        ("DebertaForMaskedLM", dict(talking_head=True), "deberta's config has talking_head True, .* ours has False"),
        ("DebertaV2ForMaskedLM", dict(embedding_size=12), "deberta.* embedding_size 12, .*: ours has hidden_size, 24"),
        ("DebertaV2ForMaskedLM", dict(attention_head_size=8), "attention_head_size 8"),
        ("DebertaV2ForMaskedLM", dict(conv_kernel_size=3, conv_act="mish"), "conv_act 'mish'"),
        ("XLNetLMHeadModel", dict(attn_type="uni"), "xlnet's config has attn_type 'uni', .*: ours has 'bi'"),
        ("XLNetLMHeadModel", dict(bi_data=True), "bi_data True"),
        ("XLNetLMHeadModel", dict(same_length=True), "same_length True"),
        ("BartForConditionalGeneration", dict(decoder_ffn_dim=44), "decoder_ffn_dim 44"),
        ("BartForConditionalGeneration", dict(decoder_layerdrop=0.1), "decoder_layerdrop 0.1"),
        ("T5ForConditionalGeneration", dict(feed_forward_proj="gated-mish"), "feed_forward_proj 'gated-mish'"),
        ("BertForPreTraining", dict(vocab_size=62), r"word_embeddings.weight' is \[61, 24\], .* calls for \[62, 24\]"),
        ("BertForPreTraining", dict(num_hidden_layers=3), "lacks 'bert.encoder.layer.2.attention.self.query.weight'"),
        ("BertForPreTraining", dict(num_hidden_layers=1), "has 'bert.encoder.layer.1.attention.output.LayerNorm.bias'"),
        ("LlamaForCausalLM", dict(num_key_value_heads=2), r"k_proj.weight' is \[24, 24\], .* calls for \[12, 24\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, architecture, entries, words):
    checkpoint(architecture).save_pretrained(tmp_path)
    changed(tmp_path, **entries)
    with pytest.raises(ValueError, match=words):
        interop.from_huggingface(tmp_path)


def test_a_head_that_no_model_of_ours_has_is_named():
    model = transformers.BertForSequenceClassification(checkpoint("BertModel").config)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has 'classifier.bias', which no head of ours"):
        interop.from_huggingface(model)
    assert interop.from_huggingface(model.bert).config.pooler


def test_copies_that_differ_are_named():
    model = checkpoint("T5Model")
    model.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(torch.zeros_like(model.shared.weight))
    with pytest.raises(ValueError, match=r"'encoder.embed_tokens.weight' differs from 'shared.weight'"):
        interop.from_huggingface(model)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json.*downloads nothing"):
        interop.from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"lacks model.safetensors; fastlm reads safetensors and no pickles"):
        interop.from_huggingface(tmp_path)
    interop.to_huggingface(Transformer(ModelConfig(position="t5")), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "fastlm"}')
    with pytest.raises(ValueError, match="no entry 'fastlm'"):
        interop.from_huggingface(tmp_path)

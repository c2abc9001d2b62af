"""Models of transformers with small configs and options that are not their defaults, as rows of data: a family has at
least four. What they make of a batch, beside what ours does.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastlm.models import Transformer

transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")

VOCABULARY, B, L, T = 61, 2, 11, 9  # rows, their tokens, a decoder's beside an encoder


class Checkpoint(NamedTuple):
    """A model of transformers.

    Args:
        architecture: its class.
        options: its config's that are not the family's below.
        untied: whether its head's matrix is its own where the config cannot say so.
    """

    architecture: str
    options: dict
    untied: bool = False

    def make(self) -> nn.Module:
        """In evaluation mode, with weights so large that what a token sees shows."""
        kind = getattr(transformers, self.architecture)
        config = kind.config_class(**FAMILIES[family_of(self)] | self.options)
        torch.manual_seed(0)
        model = kind._from_config(config, attn_implementation="eager").eval()
        if self.untied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        if model.config.model_type == "bart":  # transformers 5 unties these where it does the head
            inner = getattr(model, "model", model)
            inner.encoder.embed_tokens.weight = inner.decoder.embed_tokens.weight = inner.shared.weight
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=draw)
                small = p.ndim < 2 or "relative_attention_bias" in name
                p.copy_(noise * 0.2 + (small and name.endswith("weight")) if small else noise * p.shape[-1] ** -0.5)
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_(generator=draw)
        return model


_DECODER = dict(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None)
_LLAMA = _DECODER | dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=32,
)  # fmt: skip
_BERT = dict(
    vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=16,
)  # fmt: skip
_DEBERTA = _BERT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
_T5 = dict(
    vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0,
)  # fmt: skip
FAMILIES = {
    "gpt2": _DECODER | dict(n_positions=16, n_embd=24, n_layer=2, n_head=4),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "bloom": _DECODER | dict(hidden_size=24, n_layer=2, n_head=4),
    "mpt": _DECODER | dict(d_model=24, n_heads=4, n_layers=2, max_seq_len=16),
    "bert": _BERT,
    "roberta": _BERT,
    "albert": _BERT | dict(embedding_size=10),
    "electra": _BERT | dict(embedding_size=10),
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "xlnet": dict(vocab_size=VOCABULARY, d_model=24, n_layer=2, n_head=4, d_inner=40),
    "bart": dict(
        vocab_size=VOCABULARY, max_position_embeddings=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=40,
        decoder_ffn_dim=40, encoder_attention_heads=4, decoder_attention_heads=4, d_model=24,
    ),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
}  # fmt: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}  # fmt: skip
CHECKPOINTS = [
    Checkpoint("GPT2LMHeadModel", {}),
    Checkpoint("GPT2LMHeadModel", dict(n_inner=50, activation_function="relu", tie_word_embeddings=False)),
    Checkpoint("GPT2LMHeadModel", dict(scale_attn_weights=False, layer_norm_epsilon=1e-3, n_head=3)),
    Checkpoint("GPT2LMHeadModel", dict(embd_pdrop=0.0, resid_pdrop=0.2, attn_pdrop=0.3, activation_function="silu")),
    Checkpoint("GPT2Model", dict(n_layer=1, activation_function="gelu")),
    Checkpoint("LlamaForCausalLM", {}),
    Checkpoint("LlamaForCausalLM", dict(num_key_value_heads=2, tie_word_embeddings=True, head_dim=10)),
    Checkpoint("LlamaForCausalLM", dict(attention_bias=True, mlp_bias=True, hidden_act="gelu", rope_theta=500.0)),
    Checkpoint("LlamaForCausalLM", dict(attention_bias=True, num_key_value_heads=2)),
    Checkpoint("LlamaForCausalLM", dict(mlp_bias=True, hidden_act="tanh")),
    Checkpoint("LlamaForCausalLM", dict(rope_scaling={"rope_type": "linear", "factor": 2.0}, num_key_value_heads=1)),
    Checkpoint("LlamaForCausalLM", dict(rope_scaling=YARN, rms_norm_eps=1e-4)),
    Checkpoint("LlamaForCausalLM", dict(rope_scaling=YARN | dict(beta_fast=16.0, beta_slow=2.0))),
    Checkpoint("LlamaForCausalLM", dict(rope_scaling=LLAMA3, rope_theta=500.0)),
    Checkpoint("LlamaModel", dict(attention_dropout=0.1)),
    Checkpoint("MistralForCausalLM", dict(sliding_window=4, num_key_value_heads=2)),
    Checkpoint("MistralForCausalLM", dict(sliding_window=1, tie_word_embeddings=True)),
    Checkpoint("MistralForCausalLM", dict(sliding_window=None, head_dim=8)),
    Checkpoint("MistralModel", dict(sliding_window=3, rope_theta=1e6)),
    Checkpoint("Qwen2ForCausalLM", dict(num_key_value_heads=2)),
    Checkpoint("Qwen2ForCausalLM", dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)),
    Checkpoint("Qwen2ForCausalLM", dict(tie_word_embeddings=True, rope_theta=1e6, rope_scaling=YARN)),
    Checkpoint(
        "Qwen2Model",
        dict(use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
    Checkpoint("BloomForCausalLM", {}),
    Checkpoint("BloomForCausalLM", dict(n_head=6, n_layer=3, tie_word_embeddings=False)),
    Checkpoint("BloomForCausalLM", dict(layer_norm_epsilon=1e-3, hidden_dropout=0.1, attention_dropout=0.2)),
    Checkpoint("BloomModel", dict(n_head=3, vocab_size=67)),
    Checkpoint("MptForCausalLM", {}),
    Checkpoint("MptForCausalLM", dict(n_heads=6, tie_word_embeddings=False)),
    Checkpoint("MptForCausalLM", dict(attn_config={"softmax_scale": 0.3}, n_layers=3)),
    Checkpoint("MptModel", dict(layer_norm_epsilon=1e-3, n_heads=3)),
    Checkpoint("BertForPreTraining", {}),
    Checkpoint("BertForMaskedLM", dict(hidden_act="relu", type_vocab_size=3, tie_word_embeddings=False)),
    Checkpoint("BertForNextSentencePrediction", dict(hidden_act="gelu_new", num_attention_heads=2)),
    Checkpoint("BertForPreTraining", dict(hidden_dropout_prob=0.0, layer_norm_eps=1e-3, vocab_size=67)),
    Checkpoint("BertModel", dict(num_hidden_layers=1)),
    Checkpoint("RobertaForMaskedLM", dict(type_vocab_size=1)),
    Checkpoint("RobertaForMaskedLM", dict(pad_token_id=0, num_attention_heads=2, tie_word_embeddings=False)),
    Checkpoint("RobertaForMaskedLM", dict(type_vocab_size=3, pad_token_id=2, layer_norm_eps=1e-5)),
    Checkpoint("RobertaModel", dict(hidden_dropout_prob=0.0)),
    Checkpoint("AlbertForPreTraining", dict(num_hidden_layers=3)),
    Checkpoint("AlbertForPreTraining", dict(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)),
    Checkpoint(
        "AlbertForMaskedLM", dict(num_hidden_layers=3, inner_group_num=2, hidden_act="gelu", tie_word_embeddings=False)
    ),
    Checkpoint("AlbertForMaskedLM", dict(num_hidden_groups=2, embedding_size=30, type_vocab_size=4)),
    Checkpoint("AlbertModel", dict(hidden_dropout_prob=0.1)),
    Checkpoint("ElectraForPreTraining", {}),
    Checkpoint("ElectraForMaskedLM", dict(num_attention_heads=2)),
    Checkpoint("ElectraForMaskedLM", dict(embedding_size=24, tie_word_embeddings=False)),
    Checkpoint("ElectraForPreTraining", dict(embedding_size=24, type_vocab_size=3)),
    Checkpoint("ElectraModel", dict(num_hidden_layers=3, layer_norm_eps=1e-3)),
    Checkpoint("DebertaForMaskedLM", {}),
    Checkpoint("DebertaForMaskedLM", dict(max_relative_positions=6, type_vocab_size=2, position_biased_input=True)),
    Checkpoint("DebertaForMaskedLM", dict(pos_att_type="p2c", hidden_act="relu", tie_word_embeddings=False)),
    Checkpoint("DebertaForMaskedLM", dict(relative_attention=False, pos_att_type="c2p|p2c")),
    Checkpoint("DebertaModel", dict(pos_att_type=["c2p"], layer_norm_eps=1e-5, num_hidden_layers=1)),
    Checkpoint(
        "DebertaV2ForMaskedLM",
        dict(position_buckets=8, max_relative_positions=20, norm_rel_ebd="layer_norm", share_att_key=True),
    ),
    Checkpoint(
        "DebertaV2ForMaskedLM",
        dict(position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3, conv_act="gelu"),
    ),
    Checkpoint("DebertaV2ForMaskedLM", dict(max_relative_positions=7, hidden_act="gelu_new", attention_head_size=6)),
    Checkpoint("DebertaV2ForMaskedLM", dict(pos_att_type=["p2c"], share_att_key=True, position_buckets=4)),
    Checkpoint(
        "DebertaV2ForMaskedLM",
        dict(pos_att_type="c2p", conv_kernel_size=5, conv_groups=2, position_buckets=6, type_vocab_size=3),
    ),
    Checkpoint("DebertaV2Model", dict(position_biased_input=True, num_attention_heads=8, norm_rel_ebd="layer_norm")),
    Checkpoint("DebertaV2ForMaskedLM", dict(relative_attention=False, tie_word_embeddings=False)),
    Checkpoint("XLNetLMHeadModel", {}),
    Checkpoint("XLNetLMHeadModel", dict(mem_len=8, reuse_len=5, clamp_len=4)),
    Checkpoint("XLNetLMHeadModel", dict(tie_word_embeddings=False, ff_activation="relu", layer_norm_eps=1e-5)),
    Checkpoint("XLNetLMHeadModel", dict(n_head=8, n_layer=1, ff_activation="gelu_new", mem_len=None, untie_r=False)),
    Checkpoint("XLNetModel", dict(dropout=0.0, n_head=3)),
    Checkpoint("BartForConditionalGeneration", {}),
    Checkpoint("BartForConditionalGeneration", dict(encoder_layers=1, decoder_layers=3, scale_embedding=True)),
    Checkpoint("BartForConditionalGeneration", dict(activation_function="relu", tie_word_embeddings=False)),
    Checkpoint("BartForConditionalGeneration", dict(dropout=0.2, attention_dropout=0.1, activation_dropout=0.3)),
    Checkpoint("BartModel", dict(vocab_size=67, activation_function="gelu_new")),
    Checkpoint("T5ForConditionalGeneration", {}),
    Checkpoint(
        "T5ForConditionalGeneration", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), untied=True
    ),
    Checkpoint("T5ForConditionalGeneration", dict(num_decoder_layers=3, feed_forward_proj="gated-silu", d_kv=10)),
    Checkpoint(
        "T5ForConditionalGeneration", dict(relative_attention_num_buckets=8, relative_attention_max_distance=10)
    ),
    Checkpoint("T5Model", dict(feed_forward_proj="gelu", dropout_rate=0.0)),
    Checkpoint(
        "MT5ForConditionalGeneration", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), untied=True
    ),
    Checkpoint("MT5ForConditionalGeneration", dict(num_decoder_layers=1, tie_word_embeddings=False), untied=True),
    Checkpoint("MT5ForConditionalGeneration", dict(d_kv=5, feed_forward_proj="relu", tie_word_embeddings=False)),
    Checkpoint("T5EncoderModel", dict(num_layers=3, num_decoder_layers=1)),
    Checkpoint("UMT5ForConditionalGeneration", {}),
    Checkpoint("UMT5ForConditionalGeneration", dict(feed_forward_proj="relu", num_decoder_layers=3)),
    Checkpoint("UMT5Model", dict(relative_attention_num_buckets=8, relative_attention_max_distance=10)),
    Checkpoint("UMT5EncoderModel", dict(d_kv=5)),
    Checkpoint("MT5Model", dict(relative_attention_num_buckets=6, tie_word_embeddings=False)),
]


def family_of(checkpoint: Checkpoint) -> str:
    return getattr(transformers, checkpoint.architecture).config_class.model_type


def identity(checkpoint: Checkpoint) -> str:
    said = ",".join(f"{name}={value}" for name, value in checkpoint.options.items())
    return f"{checkpoint.architecture}-{said or 'defaults'}"


class Batch(NamedTuple):
    """Arguments by transformers' names, which of the outputs' positions are no padding, [B, L] or [B, T] bool, and
    which rows start with a token that is none, [B] bool.
    """

    given: dict[str, Tensor]
    real: Tensor

    @property
    def starts(self) -> Tensor:
        return self.real[:, 0]


def batches(model: nn.Module) -> dict[str, Batch]:
    """Without padding, with some on each side, and with token types where the model has them; XLNet tells any apart."""
    ids = lambda n: torch.randint(4, VOCABULARY, (B, n), generator=torch.Generator().manual_seed(n))
    both = model.config.is_encoder_decoder and not type(model).__name__.endswith("EncoderModel")
    made = {}
    for side in ("none", "right", "left"):
        given = {"input_ids": ids(L)} | ({"decoder_input_ids": ids(T)} if both else {})
        real = {}
        for name, tokens in list(given.items()):
            mask = torch.ones_like(tokens)
            if side != "none":
                mask[1, slice(6, None) if side == "right" else slice(4)] = 0
                given[name] = torch.where(mask == 1, tokens, model.config.pad_token_id or 0)
                given[name.replace("input_ids", "attention_mask")] = mask
            real[name] = mask.bool()
        made[side] = Batch(given, real["decoder_input_ids" if both else "input_ids"])
    if (kinds := 3 if model.config.model_type == "xlnet" else getattr(model.config, "type_vocab_size", 0)) > 1:
        types = torch.arange(L).expand(B, L) % kinds
        made["token types"] = made["left"]._replace(given=made["left"].given | {"token_type_ids": types})
    return made


def theirs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Logits or states of the real tokens, and logits of pairs or pooled states where there are some."""
    out = model(**batch.given)
    if "seq_relationship_logits" in out or "sop_logits" in out:
        return [out.prediction_logits[batch.real], out[1][batch.starts]]
    if out.get("pooler_output") is not None:
        return [out[0][batch.real], out.pooler_output[batch.starts]]
    return [out[0][batch.real if out[0].shape[:2] == batch.real.shape else batch.starts]]


def ours(model: Transformer, batch: Batch) -> list[Tensor]:
    given = {NAMES.get(name, name): x for name, x in batch.given.items()}
    states = model.states(given.pop("tokens"), given.pop("decoder_tokens", None), **given)
    made = [] if model.config.head == "none" and model.config.pair_labels else [states]
    made = [(x if model.head is None else model.head(x))[batch.real] for x in made]
    return made + ([] if model.pair_head is None else [model.pair_head(states)[batch.starts]])


NAMES = {"input_ids": "tokens", "decoder_input_ids": "decoder_tokens", "token_type_ids": "token_types"}

"""transformers' architectures made tiny: one config a model type, its model under eager and under fastlm with the same
weights, and what both are run on.
"""

import inspect
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")
auto = transformers.models.auto.modeling_auto

VOCABULARY, L = 97, 12
KINDS = {
    "causal": (transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (transformers.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq": (transformers.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "base": (transformers.AutoModel, auto.MODEL_MAPPING_NAMES),
}
# What configs call their sizes. A config takes those that it has.
SIZES = {
    32: "hidden_size d_model n_embd dim n_dim model_dim embedding_size embed_dim emb_dim word_embed_proj_dim",
    48: "intermediate_size ffn_dim d_ff d_inner hidden_dim ffn_hidden_size n_inner encoder_ffn_dim decoder_ffn_dim",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions max_length",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank v_head_dim bigram_vocab_size",
    8: "head_dim d_kv d_head attention_head_size kv_channels qk_nope_head_dim qk_rope_head_dim num_buckets "
    "mamba_n_heads hidden_size_per_layer_input",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads rotary_dim "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_key_value_heads num_experts_per_tok type_vocab_size eos_token_id",
    1: "n_group topk_group first_k_dense_replace bos_token_id decoder_start_token_id",
    0: "pad_token_id",
    VOCABULARY: "vocab_size n_vocab text_vocab_size vocab_size_per_layer_input pronunciation_vocab_size "
    "shape_vocab_size",
}
DROPOUTS = (
    "dropout dropout_rate attention_dropout hidden_dropout hidden_dropout_prob activation_dropout resid_pdrop "
    "embd_pdrop attention_probs_dropout_prob attn_pdrop layerdrop encoder_layerdrop decoder_layerdrop"
)
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
SIZE_OF |= dict.fromkeys(DROPOUTS.split(), 0.0)
# What the sizes above do not make fit, or show; None for the config's own.
UNFIT = {
    "deepseek_v3": dict(num_key_value_heads=4),
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 mistral4 youtu": dict(
        head_dim=None
    ),
    "lfm2_moe lfm3": dict(layer_types=["conv", "full_attention"]),
    "qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text": dict(layer_types=["linear_attention", "full_attention"]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "bamba": dict(attn_layer_indices=[1]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "mpt": dict(attn_config=None),
    "ernie4_5_moe": dict(moe_k=2),
    "xmod": dict(default_language="en_XX"),
    "gemma2 vaultgemma": dict(attn_logit_softcapping=1.0, query_pre_attn_scalar=8, sliding_window=5),
}


BEFORE_5 = transformers.__version__ < "5"


@contextmanager
def served():
    """What is done inside is served; before transformers 5 it may be refused in words, for encoders made their masks
    themselves then, and some decoders too.
    """
    try:
        yield
    except NotImplementedError as refusal:
        if not (BEFORE_5 and "attn_implementation='fastlm'" in str(refusal)):
            raise
        pytest.skip(str(refusal))


def tiny(model_type: str) -> "transformers.PreTrainedConfig":
    config = transformers.CONFIG_MAPPING[model_type]
    given = _sizes(config)
    for names, more in UNFIT.items():
        given |= more if model_type in names.split() else {}
    return config(**{name: value for name, value in given.items() if value is not None})


def make(kind: str, model_type: str, implementation: str) -> transformers.PreTrainedModel:
    """In evaluation mode, with weights so large that scores are, and that what a query sees shows."""
    torch.manual_seed(0)
    model = KINDS[kind][0].from_config(tiny(model_type), attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2 and p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=generator) * 1.5 / p.shape[-1] ** 0.5)
    return model


def parameter_count(kind: str, model_type: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in KINDS[kind][0].from_config(tiny(model_type)).parameters())


def tokens() -> Tensor:
    return torch.randint(5, VOCABULARY - 3, (2, L), generator=torch.Generator().manual_seed(3))


def batches() -> dict[str, tuple[Tensor, Tensor | None]]:
    """By name, token ids [B, L] and attention_mask [B, L] or None."""
    ids, left = tokens(), padded("left")
    return {
        "one row": (ids[:1], None),
        "no mask": (ids, None),
        "no padding": (ids, torch.ones_like(ids)),
        "padding on the right": (ids, padded("right")),
        "padding on the left": (ids, left),
        "one row, padding on the left": (ids[1:], left[1:]),
    }


def padded(side: str) -> Tensor:
    mask = torch.ones(2, L, dtype=torch.long)
    mask[1, slice(7, None) if side == "right" else slice(5)] = 0
    return mask


def outputs(model: transformers.PreTrainedModel, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What comes out where tokens are no padding, and before that what an encoder hands to its decoder."""
    given = {} if mask is None else {"attention_mask": mask}
    if not model.config.is_encoder_decoder or not model.can_generate():
        return [_real(model(input_ids=ids, **given)[0], mask)]
    out = model(input_ids=ids, decoder_input_ids=ids[:, :5].flip(0) + 1, **given)
    return [_real(out.encoder_last_hidden_state, mask), out.logits]


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """x without padding, if it has an entry for each token."""
    return x if mask is None or x.shape[:2] != mask.shape else x[mask.bool()]


def _sizes(config: type) -> dict:
    """Every size that a config or one of its parts has a name for."""
    names = {name for base in config.__mro__ for name in getattr(base, "__annotations__", {})}
    names |= set(inspect.signature(config.__init__).parameters)
    parts = {name: part for name, part in (config.sub_configs or {}).items() if hasattr(part, "model_type")}
    return {name: size for name, size in SIZE_OF.items() if name in names} | {k: _sizes(v) for k, v in parts.items()}

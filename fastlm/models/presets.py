"""Models as rows of data. A family's own name is a small model that trains on a laptop; the others have the sizes of
its papers. Each runs with every positional scheme; sizes are flags.
"""

from dataclasses import replace

from fastlm.models.config import ModelConfig

# Vaswani et al. 2017: norms after each sublayer, biases everywhere
_ORIGINAL = dict(norm="layernorm", norm_place="post", activation="gelu", gated=False, bias=True)
_ENCODER = dict(
    kind="encoder", position="learned", embedding_norm=True, norm_eps=1e-12, head_transform=True, head_bias=True,
    dropout=0.1, attention_dropout=0.1, init="bert", **_ORIGINAL,
)  # fmt: skip
_DEBERTA = _ENCODER | dict(position="deberta", norm_eps=1e-7, init="normal")
_DEBERTA_V3 = {"span": 512, "buckets": 256, "share_att_key": True, "norm_eps": 1e-7, "dropout": 0.1}
_XL = dict(
    norm="layernorm", norm_place="post", gated=False, bias=True, qkv_bias=False, out_bias=False, head_bias=True,
    position="transformer-xl", dropout=0.1, final_dropout=0.1, init="normal",
)  # fmt: skip
_GPT = dict(norm="layernorm", activation="gelu_tanh", gated=False, bias=True, position="learned")

FAMILIES: dict[str, ModelConfig] = {
    # Radford et al. 2019: LayerNorm, GELU, learned positions, biases, tied head
    "gpt": ModelConfig(**_GPT),
    # Brown et al. 2020: GPT-2 whose layers see all tokens and the last 256 in turn
    "gpt3": ModelConfig(windows=(None, 256), **_GPT),
    # Touvron et al. 2023: RMSNorm, SwiGLU, rotary positions, no biases
    "llama": ModelConfig(),
    # Jiang et al. 2023: Llama with grouped heads and a window of 4096 tokens
    "mistral": ModelConfig(kv_heads=2, windows=(4095,), tie_embeddings=False),
    # Dai et al. 2019: distances in sines, and the segment before as memory; a plain head in place of an adaptive one
    "transformer-xl": ModelConfig(
        activation="relu", scale_embedding=True, memory=128, position_options={"dropout": 0.1}, **_XL
    ),
    # Yang et al. 2019b: tokens in any order, predicted from their places; relative segments; memory
    "xlnet": ModelConfig(
        kind="encoder", activation="gelu", norm_eps=1e-12, attention_dropout=0.1, activation_dropout=0.1, memory=96,
        memory_reuse=64, two_streams=True, relative_segments=True,
        position_options={"untie": True, "dropout": 0.1}, **_XL,
    ),
    # Yang et al. 2024: Llama with grouped heads, biases on queries, keys and values, and a larger rotary base
    "qwen2": ModelConfig(kv_heads=2, qkv_bias=True, norm_eps=1e-6, position_options={"base": 1e6}),
    # Le Scao et al. 2022: ALiBi, a norm after the embedding
    "bloom": ModelConfig(**_GPT | dict(position="alibi", embedding_norm=True, init="normal")),
    # MosaicML 2023: ALiBi, no biases
    "mpt": ModelConfig(norm="layernorm", activation="gelu", gated=False, position="alibi", init="normal"),
    # Devlin et al. 2019
    "bert": ModelConfig(token_types=2, pair_labels=2, **_ENCODER),
    # Liu et al. 2019: BERT without sentence pairs; positions from 2 on, which count real tokens
    "roberta": ModelConfig(
        token_types=1, skip_padding=True, position_options={"offset": 2}, **_ENCODER | dict(norm_eps=1e-5)
    ),
    # Lan et al. 2020: a narrow embedding, one layer's weights for all, sentence order
    "albert": ModelConfig(
        token_types=2, pair_labels=2, embedding_dim=64, shared_groups=1, **_ENCODER | dict(activation="gelu_tanh")
    ),
    # Clark et al. 2020: the discriminator, and the generator beside it
    "electra": ModelConfig(token_types=2, embedding_dim=64, head="detection", **_ENCODER),
    "electra-generator": ModelConfig(token_types=2, embedding_dim=64, heads=1, **_ENCODER | dict(dim=32)),
    # He et al. 2021: content and distance in separate vectors, absolute positions in the mask decoder alone
    "deberta": ModelConfig(
        mask_decoder=True, key_bias=False, position_options={"span": 128, "dropout": 0.1}, **_DEBERTA
    ),
    # its release of v2: buckets of distance, projections shared with content, a convolution
    "deberta-v2": ModelConfig(
        mask_decoder=True, conv_width=3, position_options=_DEBERTA_V3 | {"span": 128, "buckets": 64}, **_DEBERTA
    ),
    # He et al. 2023: v2 without the convolution, trained as ELECTRA; the generator has half the layers
    "deberta-v3": ModelConfig(
        head="detection", position_options=_DEBERTA_V3 | {"span": 128, "buckets": 64}, **_DEBERTA
    ),
    "deberta-v3-generator": ModelConfig(
        layers=2, mask_decoder=True, position_options=_DEBERTA_V3 | {"span": 128, "buckets": 64}, **_DEBERTA
    ),
    # Lewis et al. 2020: learned positions from 2 on, a norm after each stack's embedding
    "bart": ModelConfig(
        kind="encoder-decoder", position="learned", position_options={"offset": 2}, embedding_norm=True,
        head_bias=True, dropout=0.1, attention_dropout=0.1, init="normal", **_ORIGINAL,
    ),
    # Song et al. 2019: BART's shape with positions from 0 on, in fairseq's Transformer
    "mass": ModelConfig(
        kind="encoder-decoder", position="learned", embedding_norm=True, dropout=0.1, attention_dropout=0.1,
        init="normal", **_ORIGINAL,
    ),
    # Raffel et al. 2020: RMSNorm, no biases, bucketed relative positions, scores that are not scaled
    "t5": ModelConfig(
        kind="encoder-decoder", position="t5", norm_eps=1e-6, activation="relu", gated=False, attention_scale=1.0,
        scale_logits=True, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, final_dropout=0.1, init="t5",
    ),
    # T5 v1.1 (Shazeer 2020; Xue et al. 2021, mT5): GEGLU, an untied head, no dropout in pretraining
    "t5-v1.1": ModelConfig(
        kind="encoder-decoder", position="t5", norm_eps=1e-6, activation="gelu_tanh", attention_scale=1.0,
        tie_embeddings=False, init="t5",
    ),
}  # fmt: skip


def _rows(family: str, columns: str, **rows: tuple) -> dict[str, ModelConfig]:
    """Sizes of one family: name with _ for - → the values of `columns`."""
    names = columns.split()
    return {
        name.replace("_", "-"): replace(FAMILIES[family], **dict(zip(names, row, strict=True)))
        for name, row in rows.items()
    }


def _llama3(factor: float) -> dict:
    """Rotary options of Llama 3.1 and later."""
    return {"base": 5e5, "scaling": {"kind": "llama3", "factor": factor, "original_context": 8192}}


SIZES: dict[str, ModelConfig] = {
    **_rows(
        "gpt", "layers dim heads context vocab_size",
        gpt2=(12, 768, 12, 1024, 50257), gpt2_medium=(24, 1024, 16, 1024, 50257),
        gpt2_large=(36, 1280, 20, 1024, 50257), gpt2_xl=(48, 1600, 25, 1024, 50257),
    ),
    # Brown et al. 2020, table 2.1, whose 24 heads of 128 at 1.3B and width of 5140 at 13B are 16 and 5120 here
    **_rows(
        "gpt3", "layers dim heads head_dim context vocab_size",
        gpt3_125m=(12, 768, 12, 64, 2048, 50257), gpt3_350m=(24, 1024, 16, 64, 2048, 50257),
        gpt3_760m=(24, 1536, 16, 96, 2048, 50257), **{"gpt3_1.3b": (24, 2048, 16, 128, 2048, 50257)},
        **{"gpt3_2.7b": (32, 2560, 32, 80, 2048, 50257), "gpt3_6.7b": (32, 4096, 32, 128, 2048, 50257)},
        gpt3_13b=(40, 5120, 40, 128, 2048, 50257), gpt3_175b=(96, 12288, 96, 128, 2048, 50257),
    ),
    # Touvron et al. 2023, Touvron et al. 2023b, Grattafiori et al. 2024
    **_rows(
        "llama", "layers dim heads kv_heads hidden context vocab_size norm_eps tie_embeddings",
        llama_7b=(32, 4096, 32, None, 11008, 2048, 32000, 1e-6, False),
        llama_13b=(40, 5120, 40, None, 13824, 2048, 32000, 1e-6, False),
        llama_33b=(60, 6656, 52, None, 17920, 2048, 32000, 1e-6, False),
        llama_65b=(80, 8192, 64, None, 22016, 2048, 32000, 1e-6, False),
        llama2_7b=(32, 4096, 32, None, 11008, 4096, 32000, 1e-5, False),
        llama2_13b=(40, 5120, 40, None, 13824, 4096, 32000, 1e-5, False),
        llama2_70b=(80, 8192, 64, 8, 28672, 4096, 32000, 1e-5, False),
    ),
    **_rows(
        "llama", "layers dim heads kv_heads hidden context vocab_size tie_embeddings position_options",
        llama3_8b=(32, 4096, 32, 8, 14336, 8192, 128256, False, {"base": 5e5}),
        llama3_70b=(80, 8192, 64, 8, 28672, 8192, 128256, False, {"base": 5e5}),
        **{"llama3.1_8b": (32, 4096, 32, 8, 14336, 131072, 128256, False, _llama3(8.0)),
           "llama3.2_1b": (16, 2048, 32, 8, 8192, 131072, 128256, True, _llama3(32.0))},
    ),
    # Dai et al. 2019's released scripts: WikiText-103 and enwik8
    **_rows(
        "transformer-xl", "layers dim heads head_dim hidden context memory vocab_size",
        transformer_xl_wt103_base=(16, 410, 10, 41, 2100, 150, 150, 267735),
        transformer_xl_wt103_large=(18, 1024, 16, 64, 4096, 384, 384, 267735),
        transformer_xl_enwik8_base=(12, 512, 8, 64, 2048, 512, 512, 204),
        transformer_xl_enwik8_large=(24, 1024, 8, 128, 3072, 768, 768, 204),
    ),
    **_rows(
        "xlnet", "layers dim heads context vocab_size memory memory_reuse",
        xlnet_base=(12, 768, 12, 512, 32000, 384, 256), xlnet_large=(24, 1024, 16, 512, 32000, 384, 256),
    ),
    **_rows(
        "mistral", "layers dim heads kv_heads hidden context vocab_size",
        mistral_7b=(32, 4096, 32, 8, 14336, 32768, 32000),
    ),
    **_rows(
        "qwen2", "layers dim heads kv_heads hidden context vocab_size tie_embeddings",
        **{"qwen2_0.5b": (24, 896, 14, 2, 4864, 32768, 151936, True),
           "qwen2_7b": (28, 3584, 28, 4, 18944, 32768, 152064, False)},
    ),
    **_rows(
        "bloom", "layers dim heads context vocab_size",
        bloom_560m=(24, 1024, 16, 2048, 250880), **{"bloom_1.1b": (24, 1536, 16, 2048, 250880)},
        bloom_176b=(70, 14336, 112, 2048, 250880),
    ),
    **_rows("mpt", "layers dim heads context vocab_size", mpt_7b=(32, 4096, 32, 2048, 50432)),
    **_rows(
        "bert", "layers dim heads context vocab_size",
        bert_base=(12, 768, 12, 512, 30522), bert_large=(24, 1024, 16, 512, 30522),
    ),
    **_rows(
        "roberta", "layers dim heads context vocab_size",
        roberta_base=(12, 768, 12, 512, 50265), roberta_large=(24, 1024, 16, 512, 50265),
    ),
    **_rows(
        "albert", "layers dim heads hidden embedding_dim context vocab_size dropout attention_dropout",
        albert_base=(12, 768, 12, 3072, 128, 512, 30000, 0.1, 0.1),
        albert_large=(24, 1024, 16, 4096, 128, 512, 30000, 0.1, 0.1),
        albert_xlarge=(24, 2048, 16, 8192, 128, 512, 30000, 0.1, 0.1),
        albert_xxlarge=(12, 4096, 64, 16384, 128, 512, 30000, 0.0, 0.0),
        albert_base_v2=(12, 768, 12, 3072, 128, 512, 30000, 0.0, 0.0),
        albert_large_v2=(24, 1024, 16, 4096, 128, 512, 30000, 0.0, 0.0),
        albert_xlarge_v2=(24, 2048, 16, 8192, 128, 512, 30000, 0.0, 0.0),
        albert_xxlarge_v2=(12, 4096, 64, 16384, 128, 512, 30000, 0.0, 0.0),
    ),
    **_rows(
        "electra", "layers dim heads embedding_dim context vocab_size",
        electra_small=(12, 256, 4, 128, 512, 30522), electra_base=(12, 768, 12, 768, 512, 30522),
        electra_large=(24, 1024, 16, 1024, 512, 30522),
    ),
    **_rows(
        "electra-generator", "layers dim heads embedding_dim context vocab_size",
        electra_small_generator=(12, 64, 1, 128, 512, 30522), electra_base_generator=(12, 256, 4, 768, 512, 30522),
        electra_large_generator=(24, 256, 4, 1024, 512, 30522),
    ),
    **_rows(
        "deberta", "layers dim heads context vocab_size position_options",
        deberta_base=(12, 768, 12, 512, 50265, {"span": 512, "dropout": 0.1}),
        deberta_large=(24, 1024, 16, 512, 50265, {"span": 512, "dropout": 0.1}),
        deberta_xlarge=(48, 1024, 16, 512, 50265, {"span": 512, "dropout": 0.1}),
    ),
    **_rows(
        "deberta-v2", "layers dim heads context vocab_size position_options",
        deberta_v2_xlarge=(24, 1536, 24, 512, 128100, _DEBERTA_V3),
        deberta_v2_xxlarge=(48, 1536, 24, 512, 128100, _DEBERTA_V3),
    ),
    **_rows(
        "deberta-v3", "layers dim heads context vocab_size position_options",
        deberta_v3_xsmall=(12, 384, 6, 512, 128100, _DEBERTA_V3),
        deberta_v3_small=(6, 768, 12, 512, 128100, _DEBERTA_V3),
        deberta_v3_base=(12, 768, 12, 512, 128100, _DEBERTA_V3),
        deberta_v3_large=(24, 1024, 16, 512, 128100, _DEBERTA_V3),
    ),
    **_rows(
        "deberta-v3-generator", "layers dim heads context vocab_size position_options",
        deberta_v3_base_generator=(6, 768, 12, 512, 128100, _DEBERTA_V3),
        deberta_v3_large_generator=(12, 1024, 16, 512, 128100, _DEBERTA_V3),
    ),
    **_rows(
        "bart", "encoder_layers layers dim heads context vocab_size",
        bart_base=(6, 6, 768, 12, 1024, 50265), bart_large=(12, 12, 1024, 16, 1024, 50265),
    ),
    **_rows("mass", "encoder_layers layers dim heads context vocab_size", mass_base=(6, 6, 1024, 8, 512, 30522)),
    **_rows(
        "t5", "layers dim heads head_dim hidden context vocab_size",
        t5_small=(6, 512, 8, 64, 2048, 512, 32128), t5_base=(12, 768, 12, 64, 3072, 512, 32128),
        t5_large=(24, 1024, 16, 64, 4096, 512, 32128), t5_3b=(24, 1024, 32, 128, 16384, 512, 32128),
        t5_11b=(24, 1024, 128, 128, 65536, 512, 32128),
    ),
    **_rows(
        "t5-v1.1", "layers dim heads head_dim hidden context vocab_size",
        **{"t5_v1.1_small": (8, 512, 6, 64, 1024, 512, 32128), "t5_v1.1_base": (12, 768, 12, 64, 2048, 512, 32128),
           "t5_v1.1_large": (24, 1024, 16, 64, 2816, 512, 32128), "t5_v1.1_xl": (24, 2048, 32, 64, 5120, 512, 32128),
           "t5_v1.1_xxl": (24, 4096, 64, 64, 10240, 512, 32128)},
        mt5_small=(8, 512, 6, 64, 1024, 1024, 250112), mt5_base=(12, 768, 12, 64, 2048, 1024, 250112),
        mt5_large=(24, 1024, 16, 64, 2816, 1024, 250112),
    ),
}  # fmt: skip

PRESETS: dict[str, ModelConfig] = FAMILIES | SIZES


def preset(name: str, **changes) -> ModelConfig:
    """The preset called `name`, some fields changed.

    Args:
        name: a key of PRESETS, such as "llama", "bert-base" or "t5-v1.1-small".
        changes: fields of `ModelConfig` with other values.

    Returns:
        A ModelConfig.

    Raises:
        ValueError: for a name that is not in PRESETS, and for values that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose from {', '.join(sorted(PRESETS))}")
    return replace(PRESETS[name], **changes)

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
_DEBERTA_V1 = {"span": 512, "dropout": 0.1}
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
    # Yang et al. 2024: Llama with grouped heads, biases on queries, keys and values, and a larger rotary base
    "qwen2": ModelConfig(kv_heads=2, qkv_bias=True, norm_eps=1e-6, position_options={"base": 1e6}),
    # Le Scao et al. 2022: ALiBi, a norm after the embedding
    "bloom": ModelConfig(**_GPT | dict(position="alibi", embedding_norm=True, init="normal")),
    # MosaicML 2023: ALiBi, no biases
    "mpt": ModelConfig(norm="layernorm", activation="gelu", gated=False, position="alibi", init="normal"),
    # Dai et al. 2019: distances in sines, and the segment before as memory; a plain head in place of an adaptive one
    "transformer-xl": ModelConfig(
        activation="relu", scale_embedding=True, memory=128, position_options={"dropout": 0.1}, **_XL
    ),
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
    # Yang et al. 2019b: tokens in any order, predicted from their places; relative segments; memory
    "xlnet": ModelConfig(
        kind="encoder", activation="gelu", norm_eps=1e-12, attention_dropout=0.1, activation_dropout=0.1, memory=96,
        memory_reuse=64, two_streams=True, relative_segments=True,
        position_options={"untie": True, "dropout": 0.1}, **_XL,
    ),
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


def _size(
    family: str, layers: int, dim: int, heads: int, context: int, vocab_size: int, **changes: object
) -> tuple[str, ModelConfig]:
    sizes = dict(layers=layers, dim=dim, heads=heads, context=context, vocab_size=vocab_size)
    return family, replace(FAMILIES[family], **sizes, **changes)


def _llama3(factor: float) -> dict:
    """Rotary options of Llama 3.1 and later."""
    return {"base": 5e5, "scaling": {"kind": "llama3", "factor": factor, "original_context": 8192}}


_LLAMA = dict(norm_eps=1e-6, tie_embeddings=False)
_V2 = dict(dropout=0.0, attention_dropout=0.0)  # ALBERT's second version

SIZED: dict[str, tuple[str, ModelConfig]] = {
    # family, layers, dim, heads, context, vocab_size
    "gpt2": _size("gpt", 12, 768, 12, 1024, 50257),
    "gpt2-medium": _size("gpt", 24, 1024, 16, 1024, 50257),
    "gpt2-large": _size("gpt", 36, 1280, 20, 1024, 50257),
    "gpt2-xl": _size("gpt", 48, 1600, 25, 1024, 50257),
    # table 2.1, whose 24 heads of 128 at 1.3B and width of 5140 at 13B are 16 and 5120 here
    "gpt3-125m": _size("gpt3", 12, 768, 12, 2048, 50257),
    "gpt3-350m": _size("gpt3", 24, 1024, 16, 2048, 50257),
    "gpt3-760m": _size("gpt3", 24, 1536, 16, 2048, 50257),
    "gpt3-1.3b": _size("gpt3", 24, 2048, 16, 2048, 50257),
    "gpt3-2.7b": _size("gpt3", 32, 2560, 32, 2048, 50257),
    "gpt3-6.7b": _size("gpt3", 32, 4096, 32, 2048, 50257),
    "gpt3-13b": _size("gpt3", 40, 5120, 40, 2048, 50257),
    "gpt3-175b": _size("gpt3", 96, 12288, 96, 2048, 50257),
    # Touvron et al. 2023 and 2023b, Grattafiori et al. 2024
    "llama-7b": _size("llama", 32, 4096, 32, 2048, 32000, hidden=11008, **_LLAMA),
    "llama-13b": _size("llama", 40, 5120, 40, 2048, 32000, hidden=13824, **_LLAMA),
    "llama-33b": _size("llama", 60, 6656, 52, 2048, 32000, hidden=17920, **_LLAMA),
    "llama-65b": _size("llama", 80, 8192, 64, 2048, 32000, hidden=22016, **_LLAMA),
    "llama2-7b": _size("llama", 32, 4096, 32, 4096, 32000, hidden=11008, tie_embeddings=False),
    "llama2-13b": _size("llama", 40, 5120, 40, 4096, 32000, hidden=13824, tie_embeddings=False),
    "llama2-70b": _size("llama", 80, 8192, 64, 4096, 32000, kv_heads=8, hidden=28672, tie_embeddings=False),
    "llama3-8b": _size(
        "llama", 32, 4096, 32, 8192, 128256, kv_heads=8, hidden=14336, tie_embeddings=False,
        position_options={"base": 5e5},
    ),
    "llama3-70b": _size(
        "llama", 80, 8192, 64, 8192, 128256, kv_heads=8, hidden=28672, tie_embeddings=False,
        position_options={"base": 5e5},
    ),
    "llama3.1-8b": _size(
        "llama", 32, 4096, 32, 131072, 128256, kv_heads=8, hidden=14336, tie_embeddings=False,
        position_options=_llama3(8.0),
    ),
    "llama3.2-1b": _size(
        "llama", 16, 2048, 32, 131072, 128256, kv_heads=8, hidden=8192, position_options=_llama3(32.0)
    ),
    "mistral-7b": _size("mistral", 32, 4096, 32, 32768, 32000, kv_heads=8, hidden=14336),
    "qwen2-0.5b": _size("qwen2", 24, 896, 14, 32768, 151936, hidden=4864),
    "qwen2-7b": _size("qwen2", 28, 3584, 28, 32768, 152064, kv_heads=4, hidden=18944, tie_embeddings=False),
    "bloom-560m": _size("bloom", 24, 1024, 16, 2048, 250880),
    "bloom-1.1b": _size("bloom", 24, 1536, 16, 2048, 250880),
    "bloom-176b": _size("bloom", 70, 14336, 112, 2048, 250880),
    "mpt-7b": _size("mpt", 32, 4096, 32, 2048, 50432),
    "bert-base": _size("bert", 12, 768, 12, 512, 30522),
    "bert-large": _size("bert", 24, 1024, 16, 512, 30522),
    "roberta-base": _size("roberta", 12, 768, 12, 512, 50265),
    "roberta-large": _size("roberta", 24, 1024, 16, 512, 50265),
    "albert-base": _size("albert", 12, 768, 12, 512, 30000, embedding_dim=128),
    "albert-large": _size("albert", 24, 1024, 16, 512, 30000, embedding_dim=128),
    "albert-xlarge": _size("albert", 24, 2048, 16, 512, 30000, embedding_dim=128),
    "albert-xxlarge": _size("albert", 12, 4096, 64, 512, 30000, embedding_dim=128),
    "albert-base-v2": _size("albert", 12, 768, 12, 512, 30000, embedding_dim=128, **_V2),
    "albert-large-v2": _size("albert", 24, 1024, 16, 512, 30000, embedding_dim=128, **_V2),
    "albert-xlarge-v2": _size("albert", 24, 2048, 16, 512, 30000, embedding_dim=128, **_V2),
    "albert-xxlarge-v2": _size("albert", 12, 4096, 64, 512, 30000, embedding_dim=128, **_V2),
    "electra-small": _size("electra", 12, 256, 4, 512, 30522, embedding_dim=128),
    "electra-base": _size("electra", 12, 768, 12, 512, 30522, embedding_dim=None),
    "electra-large": _size("electra", 24, 1024, 16, 512, 30522, embedding_dim=None),
    "electra-small-generator": _size("electra-generator", 12, 64, 1, 512, 30522, embedding_dim=128),
    "electra-base-generator": _size("electra-generator", 12, 256, 4, 512, 30522, embedding_dim=768),
    "electra-large-generator": _size("electra-generator", 24, 256, 4, 512, 30522, embedding_dim=1024),
    # Dai et al. 2019's released scripts: WikiText-103 and enwik8
    "transformer-xl-wt103-base": _size(
        "transformer-xl", 16, 410, 10, 150, 267735, head_dim=41, hidden=2100, memory=150
    ),
    "transformer-xl-wt103-large": _size("transformer-xl", 18, 1024, 16, 384, 267735, hidden=4096, memory=384),
    "transformer-xl-enwik8-base": _size("transformer-xl", 12, 512, 8, 512, 204, hidden=2048, memory=512),
    "transformer-xl-enwik8-large": _size("transformer-xl", 24, 1024, 8, 768, 204, hidden=3072, memory=768),
    "xlnet-base": _size("xlnet", 12, 768, 12, 512, 32000, memory=384, memory_reuse=256),
    "xlnet-large": _size("xlnet", 24, 1024, 16, 512, 32000, memory=384, memory_reuse=256),
    "deberta-base": _size("deberta", 12, 768, 12, 512, 50265, position_options=_DEBERTA_V1),
    "deberta-large": _size("deberta", 24, 1024, 16, 512, 50265, position_options=_DEBERTA_V1),
    "deberta-xlarge": _size("deberta", 48, 1024, 16, 512, 50265, position_options=_DEBERTA_V1),
    "deberta-v2-xlarge": _size("deberta-v2", 24, 1536, 24, 512, 128100, position_options=_DEBERTA_V3),
    "deberta-v2-xxlarge": _size("deberta-v2", 48, 1536, 24, 512, 128100, position_options=_DEBERTA_V3),
    "deberta-v3-xsmall": _size("deberta-v3", 12, 384, 6, 512, 128100, position_options=_DEBERTA_V3),
    "deberta-v3-small": _size("deberta-v3", 6, 768, 12, 512, 128100, position_options=_DEBERTA_V3),
    "deberta-v3-base": _size("deberta-v3", 12, 768, 12, 512, 128100, position_options=_DEBERTA_V3),
    "deberta-v3-large": _size("deberta-v3", 24, 1024, 16, 512, 128100, position_options=_DEBERTA_V3),
    "deberta-v3-base-generator": _size(
        "deberta-v3-generator", 6, 768, 12, 512, 128100, position_options=_DEBERTA_V3
    ),
    "deberta-v3-large-generator": _size(
        "deberta-v3-generator", 12, 1024, 16, 512, 128100, position_options=_DEBERTA_V3
    ),
    "bart-base": _size("bart", 6, 768, 12, 1024, 50265),
    "bart-large": _size("bart", 12, 1024, 16, 1024, 50265),
    "mass-base": _size("mass", 6, 1024, 8, 512, 30522),
    "t5-small": _size("t5", 6, 512, 8, 512, 32128),
    "t5-base": _size("t5", 12, 768, 12, 512, 32128),
    "t5-large": _size("t5", 24, 1024, 16, 512, 32128),
    "t5-3b": _size("t5", 24, 1024, 32, 512, 32128, head_dim=128, hidden=16384),
    "t5-11b": _size("t5", 24, 1024, 128, 512, 32128, head_dim=128, hidden=65536),
    "t5-v1.1-small": _size("t5-v1.1", 8, 512, 6, 512, 32128, head_dim=64, hidden=1024),
    "t5-v1.1-base": _size("t5-v1.1", 12, 768, 12, 512, 32128),
    "t5-v1.1-large": _size("t5-v1.1", 24, 1024, 16, 512, 32128, hidden=2816),
    "t5-v1.1-xl": _size("t5-v1.1", 24, 2048, 32, 512, 32128, hidden=5120),
    "t5-v1.1-xxl": _size("t5-v1.1", 24, 4096, 64, 512, 32128, hidden=10240),
    "mt5-small": _size("t5-v1.1", 8, 512, 6, 1024, 250112, head_dim=64, hidden=1024),
    "mt5-base": _size("t5-v1.1", 12, 768, 12, 1024, 250112),
    "mt5-large": _size("t5-v1.1", 24, 1024, 16, 1024, 250112, hidden=2816),
}  # fmt: skip

SIZES: dict[str, ModelConfig] = {name: config for name, (_, config) in SIZED.items()}
PRESETS: dict[str, ModelConfig] = FAMILIES | SIZES
FAMILY: dict[str, str] = {name: name for name in FAMILIES} | {name: family for name, (family, _) in SIZED.items()}


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

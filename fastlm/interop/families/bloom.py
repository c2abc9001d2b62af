"""BLOOM (Le Scao et al. 2022), as transformers' BloomForCausalLM has it."""

import torch

from fastlm.interop.family import Family, Parts, TensorSlice, affine
from fastlm.models import ModelConfig

LAYER = {"input_layernorm": "attention_norm", "self_attention.query_key_value": "attention.qkv",
         "self_attention.dense": "attention.out", "post_attention_layernorm": "mlp_norm",
         "mlp.dense_h_to_4h": "mlp.inner", "mlp.dense_4h_to_h": "mlp.out"}  # fmt: skip


def read(entries: dict) -> dict:
    width = entries.pop("hidden_size", 64)
    width = entries.pop("n_embed", None) or width  # the name of it, and that of the heads, in the first checkpoints
    return {
        "dim": width,
        "hidden": 4 * width,
        "heads": entries.pop("num_attention_heads", None) or entries.pop("n_head", 8),
    }


def write(c: ModelConfig) -> dict:
    return {"hidden_size": c.dim, "n_head": c.heads}


def parts(c: ModelConfig) -> Parts:
    yield TensorSlice("transformer.word_embeddings.weight", "embedding.weight")
    yield from affine("transformer.word_embeddings_layernorm", "decoder.embedding_norm")
    rows = torch.arange(3 * c.dim).view(3, c.heads, -1).transpose(0, 1).flatten()  # theirs: head, q k v, channel
    for i in range(c.layers):
        for theirs, ours in LAYER.items():
            which = rows if ours == "attention.qkv" else slice(None)
            yield from affine(f"transformer.h.{i}.{theirs}", f"decoder.blocks.{i}.{ours}", rows=which)
    yield from affine("transformer.ln_f", "decoder.norm")
    if c.head == "lm" and not c.tie_embeddings:
        yield TensorSlice("lm_head.weight", "head.weight")


BLOOM = Family(
    "bloom",
    {("lm", 0): "BloomForCausalLM", ("none", 0): "BloomModel"},
    parts,
    options={
        "vocab_size": ("vocab_size", 250880), "seq_length": ("context", 2048), "n_layer": ("layers", 2),
        "layer_norm_epsilon": ("norm_eps", 1e-5), "hidden_dropout": ("dropout", 0.0),
        "attention_dropout": ("attention_dropout", 0.0), "tie_word_embeddings": ("tie_embeddings", True),
    },
    fixed={
        "apply_residual_connection_post_layernorm": False, "slow_but_exact": False, "n_inner": None,
    },
    always=dict(
        norm="layernorm", gated=False, activation="gelu_tanh", bias=True, position="alibi", embedding_norm=True,
        embedding_dropout=0.0,
    ),
    read=read,
    write=write,
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    meaningless="pretraining_tp offset_alibi skip_bias_add skip_bias_add_qkv attention_softmax_in_fp32 "
    "masked_softmax_fusion bias_dropout_fusion unk_token_id",
)  # fmt: skip

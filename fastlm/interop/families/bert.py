"""BERT (Devlin et al. 2019), as transformers' BertForPreTraining has it, and what its descendants share."""

import re

from fastlm.interop.family import Family, Parts, TensorSlice, affine, heads
from fastlm.models import ModelConfig

OPTIONS = {
    "vocab_size": ("vocab_size", 30522), "hidden_size": ("dim", 768), "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12), "intermediate_size": ("hidden", 3072), "hidden_act": ("activation", "gelu"),
    "hidden_dropout_prob": ("dropout", 0.1), "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "max_position_embeddings": ("context", 512), "type_vocab_size": ("token_types", 2),
    "layer_norm_eps": ("norm_eps", 1e-12), "tie_word_embeddings": ("tie_embeddings", True),
}  # fmt: skip
FIXED = {"position_embedding_type": "absolute"}
ALWAYS = dict(
    kind="encoder", norm="layernorm", norm_place="post", embedding_norm=True, gated=False, bias=True,
    position="learned", head_transform=True, head_bias=True, init="bert",
)  # fmt: skip
BUFFERS = r"embeddings\.(position_ids|token_type_ids)$"
POOLER = r"(^|\.)pooler\."


def embeddings(c: ModelConfig, base: str) -> Parts:
    """base is the name of the base model, with a point."""
    if not c.token_types:
        raise ValueError("token_types is 0; a model of BERT's kind has at least 1")
    yield TensorSlice(f"{base}embeddings.word_embeddings.weight", "embedding.weight")
    yield TensorSlice(f"{base}embeddings.position_embeddings.weight", "encoder.position.weight")
    yield TensorSlice(f"{base}embeddings.token_type_embeddings.weight", "encoder.types.weight")
    yield from affine(f"{base}embeddings.LayerNorm", "encoder.embedding_norm")


def layers(c: ModelConfig, base: str) -> Parts:
    for i in range(c.layers):
        theirs, ours = f"{base}encoder.layer.{i}", f"encoder.blocks.{i}"
        attention = f"{theirs}.attention.self"
        yield from heads(c, f"{attention}.query {attention}.key {attention}.value", f"{ours}.attention.qkv")
        yield from affine(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        yield from affine(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        yield from affine(f"{theirs}.intermediate.dense", f"{ours}.mlp.inner")
        yield from affine(f"{theirs}.output.dense", f"{ours}.mlp.out")
        yield from affine(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm")


def lm_head(c: ModelConfig, dense: str, norm: str, bias: str, matrix: str) -> Parts:
    """Under these names, where c has one. In transformers 5 a matrix of its own comes with a bias of its own, and the
    first bias is idle then.
    """
    if c.head == "lm":
        yield from affine(dense, "head.transform.linear")
        yield from affine(norm, "head.transform.norm")
        yield TensorSlice(bias, "head.bias")
        if not c.tie_embeddings:
            yield from affine(matrix.removesuffix(".weight"), "head")


def pair_head(c: ModelConfig, pooler: str, out: str = "") -> Parts:
    """Under these names, where c has one, or the pooler without it."""
    if c.pair_labels or c.pooler:
        yield from affine(pooler, "pair_head.pooler")
    if c.pair_labels:
        yield from affine(out, "pair_head.out")


def shown(c: ModelConfig, names: set[str]) -> dict:
    """Whether a base model has its pooler."""
    pooler = any(re.search(POOLER, name) for name in names)
    return {"pooler": pooler and c.head == "none" and not c.pair_labels}


def parts(c: ModelConfig) -> Parts:
    yield from embeddings(c, "bert.")
    yield from layers(c, "bert.")
    yield from pair_head(c, "bert.pooler.dense", "cls.seq_relationship")
    yield from lm_head(
        c, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
        "cls.predictions.decoder.weight",
    )  # fmt: skip


BERT = Family(
    "bert",
    {("lm", 2): "BertForPreTraining", ("lm", 0): "BertForMaskedLM", ("none", 2): "BertForNextSentencePrediction",
     ("none", 0): "BertModel"},
    parts,
    options=OPTIONS,
    fixed=FIXED,
    always=ALWAYS,
    shown=shown,
    prefix="bert.",
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    buffers=BUFFERS,
    pooler=POOLER,
)  # fmt: skip

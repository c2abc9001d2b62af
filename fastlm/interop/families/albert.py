"""ALBERT (Lan et al. 2020), as transformers' AlbertForPreTraining has it. Its dropout there leaves out the feed-forward
layers, where ours has it as in the paper's code.
"""

from fastlm.interop.families.bert import ALWAYS, BUFFERS, FIXED, OPTIONS, POOLER, embeddings, lm_head, pair_head, shown
from fastlm.interop.family import Family, Parts, affine, heads
from fastlm.models import ModelConfig


def read(entries: dict) -> dict:
    embedding, width = entries.pop("embedding_size", 128), entries.get("hidden_size", 4096)
    if embedding == width:
        raise ALBERT.refusal("embedding_size", embedding, "at hidden_size our embedding has no linear layer behind it")
    return {"embedding_dim": embedding}


def write(c: ModelConfig) -> dict:
    return {"embedding_size": c.embedding_dim, "num_hidden_groups": c.shared_groups or c.layers}


def parts(c: ModelConfig) -> Parts:
    yield from embeddings(c, "albert.")
    yield from affine("albert.encoder.embedding_hidden_mapping_in", "encoder.project")
    for i in range((c.shared_groups or c.layers) * c.group_blocks):
        group, block = divmod(i, c.group_blocks)
        theirs = f"albert.encoder.albert_layer_groups.{group}.albert_layers.{block}"
        ours, attention = f"encoder.blocks.{i}", f"{theirs}.attention"
        yield from heads(c, f"{attention}.query {attention}.key {attention}.value", f"{ours}.attention.qkv")
        yield from affine(f"{attention}.dense", f"{ours}.attention.out")
        yield from affine(f"{attention}.LayerNorm", f"{ours}.attention_norm")
        yield from affine(f"{theirs}.ffn", f"{ours}.mlp.inner")
        yield from affine(f"{theirs}.ffn_output", f"{ours}.mlp.out")
        yield from affine(f"{theirs}.full_layer_layer_norm", f"{ours}.mlp_norm")
    yield from pair_head(c, "albert.pooler", "sop_classifier.classifier")
    yield from lm_head(
        c, "predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder.weight"
    )


ALBERT = Family(
    "albert",
    {("lm", 2): "AlbertForPreTraining", ("lm", 0): "AlbertForMaskedLM", ("none", 0): "AlbertModel"},
    parts,
    options=OPTIONS | {
        "vocab_size": ("vocab_size", 30000), "hidden_size": ("dim", 4096), "num_attention_heads": ("heads", 64),
        "intermediate_size": ("hidden", 16384), "hidden_act": ("activation", "gelu_new"),
        "hidden_dropout_prob": ("dropout", 0.0), "attention_probs_dropout_prob": ("attention_dropout", 0.0),
        "num_hidden_groups": ("shared_groups", 1), "inner_group_num": ("group_blocks", 1),
    },
    fixed=FIXED | {"down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0},
    always=ALWAYS,
    read=read,
    write=write,
    shown=shown,
    prefix="albert.",
    copies={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    buffers=BUFFERS,
    pooler=POOLER,
)  # fmt: skip

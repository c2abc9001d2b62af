"""DeBERTa v1 (He et al. 2021), and v2 and v3 (He et al. 2023), as transformers' DebertaForMaskedLM and
DebertaV2ForMaskedLM have them.

transformers computes no enhanced mask decoder. Its positions stand in files under the name that the released
checkpoints give them, which transformers leaves unread; ours has the decoder where they do. The head of v3's released
discriminators has no class there either, and is left out.
"""

from dataclasses import replace

import torch

from fastlm.interop.families.bert import BUFFERS, OPTIONS, lm_head
from fastlm.interop.family import Family, Parts, TensorSlice, affine, heads
from fastlm.models import ModelConfig
from fastlm.positions.deberta import C2P, P2C, PRODUCTS

POSITIONS = "deberta.embeddings.position_embeddings.weight"
LAYER = {"attention.output.dense": "attention.out", "attention.output.LayerNorm": "attention_norm",
         "intermediate.dense": "mlp.inner", "output.dense": "mlp.out", "output.LayerNorm": "mlp_norm"}  # fmt: skip


def read(entries: dict) -> dict:
    width, context = entries.get("hidden_size", 768), entries.get("max_position_embeddings", 512)
    if (embedding := entries.pop("embedding_size", width)) != width:
        raise DEBERTA.refusal("embedding_size", embedding, f"ours has hidden_size, {width}")
    if not entries.pop("legacy", True):  # that head's matrix is the embedding, whatever is said of tying
        entries["tie_word_embeddings"] = True
    products = entries.pop("pos_att_type", None) or ()
    products = tuple(products.lower().split("|")) if isinstance(products, str) else tuple(products)
    span = entries.pop("max_relative_positions", -1)
    head_dim = width // entries.get("num_attention_heads", 12)
    if (given := entries.pop("attention_head_size", head_dim)) != head_dim:
        raise DEBERTA_V2.refusal("attention_head_size", given, f"its heads together are hidden_size, {width}, wide")
    if not entries.pop("relative_attention", False) or not products:  # their scale counts products all the same
        return {"position": "none", "attention_scale": ((1 + len(products)) * head_dim) ** -0.5}
    options = {"span": span if span > 0 else context, "pos_att_type": products}
    return {
        "position": "deberta",
        "position_options": options | {"dropout": entries.get("hidden_dropout_prob", 0.1)},
    }


def write(c: ModelConfig) -> dict:
    said = {"relative_attention": c.position == "deberta", "legacy": True}
    if c.position == "deberta":
        products = c.position_options.get("pos_att_type", PRODUCTS)
        return said | {
            "max_relative_positions": c.position_options.get("span", 512), "pos_att_type": list(products),
        }  # fmt: skip
    counted = 0 if c.attention_scale is None else round(1 / (c.attention_scale**2 * c.head_width)) - 1
    return said | {"pos_att_type": list(PRODUCTS[:counted])}


def read_v2(entries: dict) -> dict:
    for name, default in {"hidden_size": 1536, "num_attention_heads": 24}.items():
        entries.setdefault(name, default)
    buckets, shared = entries.pop("position_buckets", -1), entries.pop("share_att_key", False)
    normed = "layer_norm" in entries.pop("norm_rel_ebd", "none").lower()
    fields = read(entries)
    if "position_options" in fields:
        fields["position_options"] |= {
            "buckets": max(buckets, 0), "share_att_key": shared, "key_bias": not shared,
            "norm_eps": entries.get("layer_norm_eps", 1e-7) if normed else 0.0,
        }  # fmt: skip
    return fields


def write_v2(c: ModelConfig) -> dict:
    options = c.position_options
    return write(c) | {
        "position_buckets": options.get("buckets") or -1, "share_att_key": options.get("share_att_key", False),
        "norm_rel_ebd": "layer_norm" if options.get("norm_eps") else "none",
    }  # fmt: skip


def parts(c: ModelConfig) -> Parts:
    base, encoder = "deberta.embeddings", "deberta.encoder"
    yield TensorSlice(f"{base}.word_embeddings.weight", "embedding.weight")
    if c.absolute_positions:
        yield TensorSlice(POSITIONS, "encoder.absolute_position.weight")
    if c.mask_decoder:
        yield TensorSlice(POSITIONS, "encoder.mask_decoder.position.weight")
    if c.token_types:
        yield TensorSlice(f"{base}.token_type_embeddings.weight", "encoder.types.weight")
    yield from affine(f"{base}.LayerNorm", "encoder.embedding_norm")
    if c.position == "deberta":
        yield TensorSlice(f"{encoder}.rel_embeddings.weight", "encoder.position.weight")
        if c.position_options.get("norm_eps"):
            yield from affine(f"{encoder}.LayerNorm", "encoder.position.norm")
    if c.conv_width:
        yield from affine(f"{encoder}.conv.conv", "encoder.convolution.conv")
        yield from affine(f"{encoder}.conv.LayerNorm", "encoder.convolution.norm")
    for i in range(c.layers):
        ours = f"encoder.blocks.{i}"
        yield from projections(c, f"{encoder}.layer.{i}.attention.self", f"{ours}.attention")
        for theirs, own in LAYER.items():
            yield from affine(f"{encoder}.layer.{i}.{theirs}", f"{ours}.{own}")
    yield from lm_head(
        c, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
        "cls.predictions.decoder.weight",
    )  # fmt: skip


def projections(c: ModelConfig, theirs: str, ours: str) -> Parts:
    """Queries, keys and values, of the states and of the table. v1 keeps a head's three side by side."""
    n, v2 = c.heads * c.head_width, c.key_bias
    if v2:
        yield from heads(c, f"{theirs}.query_proj {theirs}.key_proj {theirs}.value_proj", f"{ours}.qkv")
    else:
        by_head = torch.arange(3 * n).view(3, c.heads, -1).transpose(0, 1).flatten()
        yield from affine(f"{theirs}.in_proj", f"{ours}.qkv", bias=False, rows=by_head)
        yield TensorSlice(f"{theirs}.q_bias", f"{ours}.qv_bias", slice(n))
        yield TensorSlice(f"{theirs}.v_bias", f"{ours}.qv_bias", slice(n, 2 * n))
    if c.position == "deberta" and not c.position_options.get("share_att_key"):
        products = c.position_options.get("pos_att_type", PRODUCTS)
        if C2P in products:
            yield from affine(f"{theirs}.pos_{'key_' if v2 else ''}proj", f"{ours}.position.key", bias=v2)
        if P2C in products:
            yield from affine(f"{theirs}.pos_{'query' if v2 else 'q'}_proj", f"{ours}.position.query")


DEBERTA = Family(
    "deberta",
    {("lm", 0): "DebertaForMaskedLM", ("none", 0): "DebertaModel"},
    parts,
    options=OPTIONS | {
        "vocab_size": ("vocab_size", 50265), "type_vocab_size": ("token_types", 0),
        "layer_norm_eps": ("norm_eps", 1e-7), "position_biased_input": ("absolute_positions", True),
    },
    fixed={"talking_head": False},
    always=dict(
        kind="encoder", norm="layernorm", norm_place="post", embedding_norm=True, gated=False, bias=True,
        key_bias=False, head_transform=True, head_bias=True, init="normal",
    ),
    read=read,
    write=write,
    shown=lambda c, names: {"mask_decoder": c.head == "lm" and POSITIONS in names and not c.absolute_positions},
    unread=lambda c: "the enhanced mask decoder" if c.mask_decoder else None,
    prefix="deberta.",
    copies={
        "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    renamed={
        r"^lm_predictions\.lm_head\.(dense|LayerNorm)\b": r"cls.predictions.transform.\1",
        r"^lm_predictions\.lm_head\.": "cls.predictions.",
    },
    buffers=BUFFERS,
    pooler=r"^mask_predictions\.",
    meaningless="pooler_dropout pooler_hidden_act pooler_hidden_size padding_idx",
)  # fmt: skip

DEBERTA_V2 = replace(
    DEBERTA,
    model_type="deberta-v2",
    architectures={("lm", 0): "DebertaV2ForMaskedLM", ("none", 0): "DebertaV2Model"},
    options=DEBERTA.options | {
        "vocab_size": ("vocab_size", 128100), "hidden_size": ("dim", 1536), "num_hidden_layers": ("layers", 24),
        "num_attention_heads": ("heads", 24), "intermediate_size": ("hidden", 6144),
        "conv_kernel_size": ("conv_width", 0), "conv_groups": ("conv_groups", 1),
        "conv_act": ("conv_activation", "tanh"),
    },
    always=DEBERTA.always | {"key_bias": True},
    read=read_v2,
    write=write_v2,
)  # fmt: skip

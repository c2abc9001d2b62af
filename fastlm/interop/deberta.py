"""DeBERTa's configs and tensors (He et al. 2021, 2023), as transformers' DebertaForMaskedLM (v1) and
DebertaV2ForMaskedLM (v2, v3) have them.

    fields    a config.json's entries → fields of ModelConfig
    entries   the way back
    parts     their tensors as rows of ours

transformers computes no enhanced mask decoder. Its positions are kept in the file under the name that the released
checkpoints give them, which transformers leaves unread.
"""

from collections.abc import Iterator

import torch

from fastlm.interop.family import TensorSlice
from fastlm.models import ModelConfig
from fastlm.positions.deberta import PRODUCTS

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "tanh": "tanh"}  # theirs → ours
# Ours in each of their models, whatever its options.
ALWAYS = dict(
    kind="encoder", norm="layernorm", norm_place="post", gated=False, bias=True, embedding_norm=True,
    head="lm", head_transform=True, head_bias=True,
)  # fmt: skip


def fields(entries: dict) -> dict:
    """Fields of our config for the entries of theirs.

    Raises:
        ValueError: for an option that we do not have.
    """
    given, v2 = entries.get, entries["model_type"] == "deberta-v2"
    dim = given("hidden_size", 1536 if v2 else 768)
    refused = dict(talking_head=False, embedding_size=dim)
    for name, value in refused.items():
        if given(name, value) != value:
            raise ValueError(f"{entries['model_type']}'s config has {name} {given(name)!r}, and ours has {value!r}")
    context, products = given("max_position_embeddings", 512), given("pos_att_type") or ()
    products = tuple(products.lower().split("|")) if isinstance(products, str) else tuple(products)
    heads = given("num_attention_heads", 24 if v2 else 12)
    head_dim = given("attention_head_size", dim // heads) if v2 else dim // heads
    made = ALWAYS | dict(
        vocab_size=given("vocab_size", 128100 if v2 else 50265), context=context, dim=dim, heads=heads,
        head_dim=head_dim, layers=given("num_hidden_layers", 24 if v2 else 12),
        hidden=given("intermediate_size", 6144 if v2 else 3072), activation=ACTIVATIONS[given("hidden_act", "gelu")],
        key_bias=v2, norm_eps=given("layer_norm_eps", 1e-7), token_types=given("type_vocab_size", 0),
        dropout=given("hidden_dropout_prob", 0.1), attention_dropout=given("attention_probs_dropout_prob", 0.1),
        tie_embeddings=given("tie_word_embeddings", True), absolute_positions=given("position_biased_input", True),
        init="normal",
    )  # fmt: skip
    if v2 and given("conv_kernel_size", 0):
        made |= dict(
            conv_width=given("conv_kernel_size"), conv_groups=given("conv_groups", 1),
            conv_activation=ACTIVATIONS[given("conv_act", "tanh")],
        )  # fmt: skip
    if not given("relative_attention", False) or not products:  # the scale counts the products that are not there too
        return made | dict(position="none", attention_scale=((1 + len(products)) * head_dim) ** -0.5)
    span, buckets = given("max_relative_positions", -1), given("position_buckets", -1) if v2 else 0
    options = dict(
        span=span if span > 0 else context, buckets=max(buckets, 0), pos_att_type=products, dropout=made["dropout"]
    )
    if v2:
        normed = "layer_norm" in given("norm_rel_ebd", "none").lower()
        options |= dict(share_att_key=given("share_att_key", False), key_bias=not given("share_att_key", False))
        options |= dict(norm_eps=made["norm_eps"] if normed else 0.0)
    return made | dict(position="deberta", position_options=options)


def entries(c: ModelConfig) -> dict:
    """The entries of config.json for one of ours, DeBERTa v1's where keys have no bias."""
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    v2, options = c.key_bias, c.position_options
    made = dict(
        model_type="deberta-v2" if v2 else "deberta",
        architectures=["DebertaV2ForMaskedLM" if v2 else "DebertaForMaskedLM"], vocab_size=c.vocab_size,
        hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.mlp_width,
        hidden_act=theirs[c.activation], hidden_dropout_prob=c.dropout,
        attention_probs_dropout_prob=c.attention_dropout, max_position_embeddings=c.context,
        type_vocab_size=c.token_types, layer_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
        position_biased_input=c.absolute_positions, relative_attention=c.position == "deberta", legacy=True,
    )  # fmt: skip
    if c.position == "deberta":
        products = options.get("pos_att_type", PRODUCTS)
        made |= dict(max_relative_positions=options.get("span", 512), pos_att_type=list(products))
    elif c.attention_scale is not None:  # their scale counts products, be they computed or not
        made["pos_att_type"] = list(PRODUCTS[: round(1 / (c.attention_scale**2 * c.head_width)) - 1])
    if v2:
        made |= dict(
            attention_head_size=c.head_width, position_buckets=options.get("buckets") or -1,
            share_att_key=options.get("share_att_key", False),
            norm_rel_ebd="layer_norm" if options.get("norm_eps") else "none",
        )  # fmt: skip
    if c.conv_width:
        made |= dict(conv_kernel_size=c.conv_width, conv_groups=c.conv_groups, conv_act=theirs[c.conv_activation])
    return made


def parts(c: ModelConfig, legacy: bool = True) -> Iterator[TensorSlice]:
    """Their tensors. legacy: whether the head has the names of BERT's, as transformers writes by default."""
    base = "deberta.embeddings"
    yield TensorSlice(f"{base}.word_embeddings.weight", "embedding.weight")
    if c.absolute_positions:
        yield TensorSlice(f"{base}.position_embeddings.weight", "encoder.absolute_position.weight")
    if c.mask_decoder:
        yield TensorSlice(f"{base}.position_embeddings.weight", "encoder.mask_decoder.position.weight")
    if c.token_types:
        yield TensorSlice(f"{base}.token_type_embeddings.weight", "encoder.types.weight")
    yield from _affine(f"{base}.LayerNorm", "encoder.embedding_norm")
    if c.position == "deberta":
        yield TensorSlice("deberta.encoder.rel_embeddings.weight", "encoder.position.weight")
        if c.position_options.get("norm_eps"):
            yield from _affine("deberta.encoder.LayerNorm", "encoder.position.norm")
    if c.conv_width:
        yield from _affine("deberta.encoder.conv.conv", "encoder.convolution.conv")
        yield from _affine("deberta.encoder.conv.LayerNorm", "encoder.convolution.norm")
    for i in range(c.layers):
        theirs, ours = f"deberta.encoder.layer.{i}", f"encoder.blocks.{i}"
        yield from _heads(c, f"{theirs}.attention.self", f"{ours}.attention")
        yield from _affine(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        yield from _affine(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        yield from _affine(f"{theirs}.intermediate.dense", f"{ours}.mlp.inner")
        yield from _affine(f"{theirs}.output.dense", f"{ours}.mlp.out")
        yield from _affine(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm")
    dense, norm, head = (
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions")
        if legacy
        else ("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", "lm_predictions.lm_head")
    )
    yield from _affine(dense, "head.transform.linear")
    yield from _affine(norm, "head.transform.norm")
    yield TensorSlice(f"{head}.bias", "head.bias")
    if not c.tie_embeddings:
        yield TensorSlice(f"{head}.decoder.weight", "head.weight")


def _heads(c: ModelConfig, theirs: str, ours: str) -> Iterator[TensorSlice]:
    """Queries, keys and values, and the projections of the table. v1 keeps each head's three side by side."""
    n, v2 = c.heads * c.head_width, c.key_bias
    if v2:
        for i, name in enumerate(("query_proj", "key_proj", "value_proj")):
            yield from _affine(f"{theirs}.{name}", f"{ours}.qkv", slice(i * n, (i + 1) * n))
    else:
        by_head = torch.arange(3 * n).view(3, c.heads, c.head_width).transpose(0, 1).flatten()
        yield TensorSlice(f"{theirs}.in_proj.weight", f"{ours}.qkv.weight", by_head)
        yield TensorSlice(f"{theirs}.q_bias", f"{ours}.qv_bias", slice(0, n))
        yield TensorSlice(f"{theirs}.v_bias", f"{ours}.qv_bias", slice(n, 2 * n))
    options = c.position_options
    if c.position != "deberta" or options.get("share_att_key"):
        return
    products = options.get("pos_att_type", PRODUCTS)
    if "c2p" in products:
        yield from _affine(f"{theirs}.pos_{'key_' if v2 else ''}proj", f"{ours}.position.key", bias=v2)
    if "p2c" in products:
        yield from _affine(f"{theirs}.pos_{'query' if v2 else 'q'}_proj", f"{ours}.position.query")


def _affine(theirs: str, ours: str, rows: slice = slice(None), bias: bool = True) -> Iterator[TensorSlice]:
    """A linear layer or a norm: its weight, and its bias where there is one."""
    for name in ("weight", "bias") if bias else ("weight",):
        yield TensorSlice(f"{theirs}.{name}", f"{ours}.{name}", rows)

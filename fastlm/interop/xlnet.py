"""XLNet's config and tensors (Yang et al. 2019), as transformers' XLNetLMHeadModel has them.

    fields    a config.json's entries → fields of ModelConfig
    entries   the way back
    parts     their tensors as rows of ours

transformers gives every layer biases of its own, whatever its untie_r says.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from fastlm.models import ModelConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}  # theirs → ours
ALWAYS = dict(
    kind="encoder", norm="layernorm", norm_place="post", gated=False, bias=True, qkv_bias=False, out_bias=False,
    head="lm", head_bias=True, position="transformer-xl", relative_segments=True, two_streams=True, init="normal",
)  # fmt: skip


class Part(NamedTuple):
    """One of their tensors, theirs, is our parameter ours; layout is (of ours, the way back)."""

    theirs: str
    ours: str
    rows: slice = slice(None)
    layout: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = (lambda x: x, lambda x: x)


def fields(entries: dict) -> dict:
    """Fields of our config for the entries of theirs.

    Raises:
        ValueError: for an option that we do not have.
    """
    given = entries.get
    for name, value in dict(attn_type="bi", bi_data=False, same_length=False).items():
        if given(name, value) != value:
            raise ValueError(f"xlnet's config has {name} {given(name)!r}, and ours has {value!r}")
    dropout = given("dropout", 0.1)
    options = {"untie": True, "clamp": max(given("clamp_len", -1), 0), "dropout": dropout}
    return ALWAYS | dict(
        vocab_size=given("vocab_size", 32000), dim=given("d_model", 1024), layers=given("n_layer", 24),
        heads=given("n_head", 16), head_dim=given("d_head"), hidden=given("d_inner", 4096),
        activation=ACTIVATIONS[given("ff_activation", "gelu")], norm_eps=given("layer_norm_eps", 1e-12),
        tie_embeddings=given("tie_word_embeddings", True), memory=given("mem_len") or 0,
        memory_reuse=given("reuse_len") or None, dropout=dropout, attention_dropout=dropout,
        activation_dropout=dropout, final_dropout=dropout, position_options=options,
    )  # fmt: skip


def entries(c: ModelConfig) -> dict:
    """The entries of config.json for one of ours."""
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return dict(
        model_type="xlnet", architectures=["XLNetLMHeadModel"], vocab_size=c.vocab_size, d_model=c.dim,
        n_layer=c.layers, n_head=c.heads, d_head=c.head_width, d_inner=c.mlp_width, ff_activation=theirs[c.activation],
        layer_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings, mem_len=c.memory or None,
        reuse_len=c.memory_reuse, dropout=c.dropout, untie_r=True, attn_type="bi", bi_data=False, same_length=False,
        clamp_len=c.position_options.get("clamp") or -1,
    )  # fmt: skip


def parts(c: ModelConfig) -> Iterator[Part]:
    """Their tensors: projections to heads are [dim, heads, head_dim] there."""
    heads = c.heads, c.head_width
    n = c.heads * c.head_width
    into = (lambda x: x.T.unflatten(1, heads), lambda x: x.flatten(1).T)
    out = (lambda x: x.unflatten(1, heads), lambda x: x.flatten(1))
    yield Part("transformer.word_embedding.weight", "embedding.weight")
    yield Part("transformer.mask_emb", "encoder.queries.start", layout=(lambda x: x[None], lambda x: x[0]))
    for i in range(c.layers):
        theirs, ours = f"transformer.layer.{i}", f"encoder.blocks.{i}"
        for j, name in enumerate("qkv"):
            yield Part(f"{theirs}.rel_attn.{name}", f"{ours}.attention.qkv.weight", slice(j * n, (j + 1) * n), into)
        yield Part(f"{theirs}.rel_attn.o", f"{ours}.attention.out.weight", layout=out)
        yield Part(f"{theirs}.rel_attn.r", f"{ours}.attention.position.project.weight", layout=into)
        for name, own in (("r_w_bias", "position.content_bias"), ("r_r_bias", "position.position_bias"),
                          ("r_s_bias", "relative_segments.segment_bias"),
                          ("seg_embed", "relative_segments.segment")):  # fmt: skip
            yield Part(f"{theirs}.rel_attn.{name}", f"{ours}.attention.{own}")
        for name, own in (("rel_attn.layer_norm", "attention_norm"), ("ff.layer_1", "mlp.inner"),
                          ("ff.layer_2", "mlp.out"), ("ff.layer_norm", "mlp_norm")):  # fmt: skip
            for kind in ("weight", "bias"):
                yield Part(f"{theirs}.{name}.{kind}", f"{ours}.{own}.{kind}")
    yield Part("lm_loss.bias", "head.bias")
    if not c.tie_embeddings:
        yield Part("lm_loss.weight", "head.weight")

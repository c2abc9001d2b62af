"""BART (Lewis et al. 2020), as transformers' BartForConditionalGeneration has it. Its final_logits_bias, which
transformers keeps constant, is our head's bias, which trains.
"""

from fastlm.interop.family import Family, Parts, TensorSlice, affine, heads
from fastlm.models import ModelConfig


def stack(c: ModelConfig, which: str, layers: int) -> Parts:
    yield TensorSlice(f"model.{which}.embed_positions.weight", f"{which}.position.weight")
    yield from affine(f"model.{which}.layernorm_embedding", f"{which}.embedding_norm")
    for i in range(layers):
        theirs, ours = f"model.{which}.layers.{i}", f"{which}.blocks.{i}"
        attention = f"{theirs}.self_attn"
        names = f"{attention}.q_proj {attention}.k_proj {attention}.v_proj"
        yield from heads(c, names, f"{ours}.attention.qkv")
        yield from affine(f"{attention}.out_proj", f"{ours}.attention.out")
        yield from affine(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm")
        if which == "decoder":
            attention = f"{theirs}.encoder_attn"
            yield from affine(f"{attention}.q_proj", f"{ours}.cross.q")
            yield from heads(c, f"{attention}.k_proj {attention}.v_proj", f"{ours}.cross.kv")
            yield from affine(f"{attention}.out_proj", f"{ours}.cross.out")
            yield from affine(f"{theirs}.encoder_attn_layer_norm", f"{ours}.cross_norm")
        yield from affine(f"{theirs}.fc1", f"{ours}.mlp.inner")
        yield from affine(f"{theirs}.fc2", f"{ours}.mlp.out")
        yield from affine(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm")


def parts(c: ModelConfig) -> Parts:
    yield TensorSlice("model.shared.weight", "embedding.weight")
    yield from stack(c, "encoder", c.layers if c.encoder_layers is None else c.encoder_layers)
    yield from stack(c, "decoder", c.layers)
    if c.head == "lm":
        yield TensorSlice("final_logits_bias", "head.bias", layout="row")
        if not c.tie_embeddings:  # then transformers 5 ties the stacks' embeddings as little
            yield TensorSlice("lm_head.weight", "head.weight")
            yield TensorSlice("model.encoder.embed_tokens.weight", "embedding.weight")
            yield TensorSlice("model.decoder.embed_tokens.weight", "embedding.weight")


BART = Family(
    "bart",
    {("lm", 0): "BartForConditionalGeneration", ("none", 0): "BartModel"},
    parts,
    options={
        "vocab_size": ("vocab_size", 50265), "max_position_embeddings": ("context", 1024), "d_model": ("dim", 1024),
        "encoder_layers": ("encoder_layers", 12), "decoder_layers": ("layers", 12),
        "encoder_attention_heads": ("heads", 16), "decoder_attention_heads": ("heads", 16),
        "encoder_ffn_dim": ("hidden", 4096), "decoder_ffn_dim": ("hidden", 4096),
        "activation_function": ("activation", "gelu"), "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.0), "activation_dropout": ("activation_dropout", 0.0),
        "scale_embedding": ("scale_embedding", False), "tie_word_embeddings": ("tie_embeddings", True),
    },
    fixed={
        "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "normalize_before": False, "normalize_embedding": True,
        "add_final_layer_norm": False, "add_bias_logits": False, "static_position_embeddings": False,
        "extra_pos_embeddings": 2,
    },
    always=dict(
        kind="encoder-decoder", norm="layernorm", norm_place="post", norm_eps=1e-5, embedding_norm=True, gated=False,
        bias=True, position="learned", position_options={"offset": 2}, head_bias=True, init="normal",
    ),
    prefix="model.",
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    meaningless="num_hidden_layers",
)  # fmt: skip

"""T5 1.0 and 1.1 (Raffel et al. 2020), mT5 (Xue et al. 2021) and UMT5 (Chung et al. 2023), as transformers'
T5ForConditionalGeneration has them, and their encoders alone.

T5 1.0 ties its head to the embedding and scales the states that the head reads; T5 1.1 does neither. transformers says
both by tie_word_embeddings. Its mT5 never scales, tied or not; before transformers 5 it did when tied.
"""

from dataclasses import replace

from fastlm.interop.family import ACTIVATIONS, Family, Parts, TensorSlice, affine, heads, stacked
from fastlm.models import ModelConfig


def read(entries: dict) -> dict:
    tied = entries.pop("tie_word_embeddings", True)
    return {"tie_embeddings": tied, "scale_logits": entries.pop("scale_decoder_outputs", tied)} | read_shape(entries)


def read_shape(entries: dict) -> dict:
    *gated, name = entries.pop("feed_forward_proj", "relu").split("-")
    name = "gelu_new" if gated and name == "gelu" else name  # in T5 gated-gelu is the approximation
    entries.pop("dense_act_fn", None), entries.pop("is_gated_act", None)  # say the same
    activation = next((ours for ours, names in ACTIVATIONS.items() if name in names), None)
    if activation is None or gated not in ([], ["gated"]):
        raise T5.refusal("feed_forward_proj", "-".join([*gated, name]), f"its activations are {', '.join(ACTIVATIONS)}")
    layers = entries.pop("num_layers", 6)
    buckets = {"buckets": entries.pop("relative_attention_num_buckets", 32)}
    return {
        "gated": bool(gated), "activation": activation, "encoder_layers": layers,
        "layers": entries.pop("num_decoder_layers", None) or layers,
        "position_options": buckets | {"max_distance": entries.pop("relative_attention_max_distance", 128)},
    }  # fmt: skip


def write(c: ModelConfig) -> dict:
    if c.scale_logits != c.tie_embeddings and c.head == "lm":
        raise ValueError("T5 scales what a tied head reads, and that alone")
    return write_shape(c)


def write_shape(c: ModelConfig) -> dict:
    name = "gelu" if c.gated and c.activation == "gelu_tanh" else ACTIVATIONS[c.activation][0]
    name = "gelu_python" if c.gated and c.activation == "gelu" else name
    return {
        "tie_word_embeddings": c.tie_embeddings, "feed_forward_proj": f"gated-{name}" if c.gated else name,
        "num_layers": c.encoder_layers, "num_decoder_layers": c.layers,
        "relative_attention_num_buckets": c.position_options.get("buckets", 32),
        "relative_attention_max_distance": c.position_options.get("max_distance", 128), "is_encoder_decoder": True,
    }  # fmt: skip


def stack(c: ModelConfig, which: str, layers: int) -> Parts:
    if not c.position_per_layer:
        bias = f"{which}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield TensorSlice(bias, f"{which}.position.weight")
    for i in range(layers):
        theirs, ours = f"{which}.block.{i}.layer", f"{which}.blocks.{i}"
        attention = f"{theirs}.0.SelfAttention"
        yield from affine(f"{theirs}.0.layer_norm", f"{ours}.attention_norm", bias=False)
        names = f"{attention}.q {attention}.k {attention}.v"
        yield from heads(c, names, f"{ours}.attention.qkv", bias=False)
        if c.position_per_layer:
            yield TensorSlice(f"{attention}.relative_attention_bias.weight", f"{ours}.attention.position.weight")
        yield from affine(f"{attention}.o", f"{ours}.attention.out", bias=False)
        if which == "decoder":
            attention = f"{theirs}.1.EncDecAttention"
            yield from affine(f"{theirs}.1.layer_norm", f"{ours}.cross_norm", bias=False)
            yield from affine(f"{attention}.q", f"{ours}.cross.q", bias=False)
            yield from heads(c, f"{attention}.k {attention}.v", f"{ours}.cross.kv", bias=False)
            yield from affine(f"{attention}.o", f"{ours}.cross.out", bias=False)
        last = f"{theirs}.{2 if which == 'decoder' else 1}"
        yield from affine(f"{last}.layer_norm", f"{ours}.mlp_norm", bias=False)
        inner = (f"{last}.DenseReluDense.wi_0", f"{last}.DenseReluDense.wi_1")
        inner = inner if c.gated else (f"{last}.DenseReluDense.wi",)
        yield from stacked(dict.fromkeys(inner, c.mlp_width), f"{ours}.mlp.inner", bias=False)
        yield from affine(f"{last}.DenseReluDense.wo", f"{ours}.mlp.out", bias=False)
    yield from affine(f"{which}.final_layer_norm", f"{which}.norm", bias=False)


def parts(c: ModelConfig) -> Parts:
    yield TensorSlice("shared.weight", "embedding.weight")
    yield from stack(c, "encoder", c.layers if c.encoder_layers is None else c.encoder_layers)
    if c.kind == "encoder":
        return
    yield from stack(c, "decoder", c.layers)
    if c.head == "lm" and not c.tie_embeddings:
        yield TensorSlice("lm_head.weight", "head.weight")


T5 = Family(
    "t5",
    {("lm", 0): "T5ForConditionalGeneration", ("none", 0): "T5Model"},
    parts,
    encoder="T5EncoderModel",
    options={
        "vocab_size": ("vocab_size", 32128), "n_positions": ("context", 512), "d_model": ("dim", 512),
        "d_kv": ("head_dim", 64), "d_ff": ("hidden", 2048), "num_heads": ("heads", 8),
        "dropout_rate": ("dropout attention_dropout activation_dropout final_dropout", 0.1),
        "layer_norm_epsilon": ("norm_eps", 1e-6),
    },
    always=dict(kind="encoder-decoder", norm="rmsnorm", position="t5", attention_scale=1.0, init="t5"),
    read=read,
    write=write,
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    buffers=r"EncDecAttention\.relative_attention_bias\.weight$",  # early T5 files have it, and nothing reads it
)  # fmt: skip


def read_mt5(entries: dict) -> dict:
    like_v1_1(entries)
    return {"tie_embeddings": entries.pop("tie_word_embeddings", True)} | read_shape(entries)


def read_umt5(entries: dict) -> dict:
    like_v1_1(entries)
    return read(entries)


def like_v1_1(entries: dict) -> None:
    entries.setdefault("feed_forward_proj", "gated-gelu")
    entries.setdefault("num_layers", 8)


MT5 = replace(
    T5,
    model_type="mt5",
    architectures={("lm", 0): "MT5ForConditionalGeneration", ("none", 0): "MT5Model"},
    encoder="MT5EncoderModel",
    options=T5.options | {
        "vocab_size": ("vocab_size", 250112), "d_ff": ("hidden", 1024), "num_heads": ("heads", 6),
    },
    read=read_mt5,
    write=write_shape,
)  # fmt: skip

UMT5 = replace(
    MT5,
    model_type="umt5",
    architectures={("lm", 0): "UMT5ForConditionalGeneration", ("none", 0): "UMT5Model"},
    encoder="UMT5EncoderModel",
    always=T5.always | {"position": "umt5"},
    read=read_umt5,
    write=write,
)

"""Llama's config and tensors (Touvron et al. 2023), as transformers' LlamaForCausalLM has them."""

from collections.abc import Iterator

from fastlm.interop.family import Family, TensorSlice
from fastlm.models import ModelConfig, Transformer


def is_llama(c: ModelConfig) -> bool:
    return (c.norm, c.mlp, c.bias, c.position) == ("rmsnorm", "swiglu", False, "rope")


def config(c: ModelConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "vocab_size": c.vocab_size, "max_position_embeddings": c.context,
        "hidden_size": c.dim, "intermediate_size": c.mlp_width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads, "head_dim": c.head_dim, "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": 10000.0, "tie_word_embeddings": c.tie_embeddings, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": "float32",
    }  # fmt: skip


def parts(model: Transformer) -> Iterator[TensorSlice]:
    c = model.config
    q, kv, hidden = c.dim, c.head_dim * (c.kv_heads or c.heads), c.mlp_width
    yield TensorSlice("model.embed_tokens.weight", "embedding.weight")
    for i in range(c.layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        yield TensorSlice(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield TensorSlice(f"{theirs}.self_attn.q_proj.weight", f"{ours}.attention.qkv.weight", slice(0, q))
        yield TensorSlice(f"{theirs}.self_attn.k_proj.weight", f"{ours}.attention.qkv.weight", slice(q, q + kv))
        yield TensorSlice(
            f"{theirs}.self_attn.v_proj.weight", f"{ours}.attention.qkv.weight", slice(q + kv, q + 2 * kv)
        )
        yield TensorSlice(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight")
        yield TensorSlice(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
        yield TensorSlice(f"{theirs}.mlp.gate_proj.weight", f"{ours}.mlp.inner.weight", slice(0, hidden))
        yield TensorSlice(f"{theirs}.mlp.up_proj.weight", f"{ours}.mlp.inner.weight", slice(hidden, 2 * hidden))
        yield TensorSlice(f"{theirs}.mlp.down_proj.weight", f"{ours}.mlp.out.weight")
    yield TensorSlice("model.norm.weight", "norm.weight")
    if not c.tie_embeddings:
        yield TensorSlice("lm_head.weight", "head.weight")


LLAMA = Family(is_llama, config, parts)

"""GPT-2's config and tensors (Radford et al. 2019), as transformers' GPT2LMHeadModel has them."""

from collections.abc import Iterator

from fastlm.interop.family import Family, TensorSlice
from fastlm.models import ModelConfig, Transformer


def is_gpt2(c: ModelConfig) -> bool:
    plain_heads = c.kv_heads in (None, c.heads)
    shape = c.norm, c.mlp, c.bias, c.position, c.tie_embeddings, plain_heads
    return shape == ("layernorm", "gelu", True, "learned", True, True)


def config(c: ModelConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size, "n_positions": c.context, "n_embd": c.dim,
        "n_layer": c.layers, "n_head": c.heads, "n_inner": c.mlp_width, "activation_function": "gelu_new",
        "layer_norm_epsilon": c.norm_eps, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": 0.0,
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip


def parts(model: Transformer) -> Iterator[TensorSlice]:
    yield TensorSlice("transformer.wte.weight", "embedding.weight")
    yield TensorSlice("transformer.wpe.weight", "position.weight")
    layers = (("ln_1", "attention_norm"), ("attn.c_attn", "attention.qkv"), ("attn.c_proj", "attention.out"),
              ("ln_2", "mlp_norm"), ("mlp.c_fc", "mlp.inner"), ("mlp.c_proj", "mlp.out"))  # fmt: skip
    for i in range(model.config.layers):
        for theirs, ours in layers:
            matrix = theirs.startswith(("attn", "mlp"))  # their Conv1D keeps [in, out]
            yield TensorSlice(f"transformer.h.{i}.{theirs}.weight", f"blocks.{i}.{ours}.weight", transposed=matrix)
            yield TensorSlice(f"transformer.h.{i}.{theirs}.bias", f"blocks.{i}.{ours}.bias")
    for name in ("weight", "bias"):
        yield TensorSlice(f"transformer.ln_f.{name}", f"norm.{name}")


GPT2 = Family(is_gpt2, config, parts)

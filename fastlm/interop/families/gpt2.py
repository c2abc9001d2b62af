"""GPT-2 (Radford et al. 2019), as transformers' GPT2LMHeadModel has it."""

from fastlm.interop.family import Family, Parts, TensorSlice, affine
from fastlm.models import ModelConfig

LAYER = {"ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
         "ln_2": "mlp_norm", "mlp.c_fc": "mlp.inner", "mlp.c_proj": "mlp.out"}  # fmt: skip


def read(entries: dict) -> dict:
    return {"attention_scale": None if entries.pop("scale_attn_weights", True) else 1.0}


def write(c: ModelConfig) -> dict:
    return {"scale_attn_weights": c.attention_scale is None}


def parts(c: ModelConfig) -> Parts:
    yield TensorSlice("transformer.wte.weight", "embedding.weight")
    yield TensorSlice("transformer.wpe.weight", "decoder.position.weight")
    for i in range(c.layers):
        for theirs, ours in LAYER.items():
            layout = "same" if "norm" in ours else "transposed"  # their Conv1D keeps [in, out]
            yield from affine(f"transformer.h.{i}.{theirs}", f"decoder.blocks.{i}.{ours}", layout=layout)
    yield from affine("transformer.ln_f", "decoder.norm")
    if c.head == "lm" and not c.tie_embeddings:
        yield TensorSlice("lm_head.weight", "head.weight")


GPT2 = Family(
    "gpt2",
    {("lm", 0): "GPT2LMHeadModel", ("none", 0): "GPT2Model"},
    parts,
    options={
        "vocab_size": ("vocab_size", 50257), "n_positions": ("context", 1024), "n_embd": ("dim", 768),
        "n_layer": ("layers", 12), "n_head": ("heads", 12), "n_inner": ("hidden", None),
        "activation_function": ("activation", "gelu_new"), "layer_norm_epsilon": ("norm_eps", 1e-5),
        "embd_pdrop": ("embedding_dropout", 0.1), "resid_pdrop": ("dropout", 0.1),
        "attn_pdrop": ("attention_dropout", 0.1), "tie_word_embeddings": ("tie_embeddings", True),
    },
    fixed={"scale_attn_by_inverse_layer_idx": False},
    always=dict(norm="layernorm", gated=False, bias=True, position="learned"),
    read=read,
    write=write,
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    meaningless="reorder_and_upcast_attn n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout",
    buffers=r"h\.\d+\.attn\.(masked_)?bias$",
)  # fmt: skip

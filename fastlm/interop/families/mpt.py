"""MPT (MosaicML 2023), as transformers' MptForCausalLM has it: with ALiBi and without biases."""

from fastlm.interop.family import UNSERVED, WITHOUT_MEANING, Family, Parts, TensorSlice, affine
from fastlm.models import ModelConfig

LAYER = {"norm_1": "attention_norm", "attn.Wqkv": "attention.qkv", "attn.out_proj": "attention.out",
         "norm_2": "mlp_norm", "ffn.up_proj": "mlp.inner", "ffn.down_proj": "mlp.out"}  # fmt: skip
ATTENTION = {"attn_type": "multihead_attention", "clip_qkv": None, "prefix_lm": False, "qk_ln": False,
             "attn_uses_sequence_id": False, "alibi": True, "alibi_bias_max": 8}  # fmt: skip


def read(entries: dict) -> dict:
    attention = dict(entries.pop("attn_config", None) or {})
    for name, value in ATTENTION.items():
        if (given := attention.pop(name, value)) != value:
            raise MPT.refusal(f"attn_config[{name!r}]", given, f"ours has {value!r}")
    dropout, scale = attention.pop("attn_pdrop", 0.0), attention.pop("softmax_scale", None)
    known = {*WITHOUT_MEANING, *UNSERVED, "architectures", "tie_word_embeddings", "attn_impl"}
    entries |= {f"attn_config[{name!r}]": value for name, value in attention.items() if name not in known}
    width = entries.pop("d_model", 2048)
    return {
        "dropout": dropout, "attention_dropout": dropout, "attention_scale": scale, "dim": width, "hidden": 4 * width,
    }  # fmt: skip


def write(c: ModelConfig) -> dict:
    dropout = c.dropout or 0  # transformers 5 wants an int
    return {"d_model": c.dim, "attn_config": {"attn_pdrop": dropout, "softmax_scale": c.attention_scale}}


def parts(c: ModelConfig) -> Parts:
    yield TensorSlice("transformer.wte.weight", "embedding.weight")
    for i in range(c.layers):
        for theirs, ours in LAYER.items():
            yield from affine(f"transformer.blocks.{i}.{theirs}", f"decoder.blocks.{i}.{ours}", bias=False)
    yield from affine("transformer.norm_f", "decoder.norm", bias=False)
    if c.head == "lm" and not c.tie_embeddings:
        yield TensorSlice("lm_head.weight", "head.weight")


MPT = Family(
    "mpt",
    {("lm", 0): "MptForCausalLM", ("none", 0): "MptModel"},
    parts,
    options={
        "vocab_size": ("vocab_size", 50368), "max_seq_len": ("context", 2048), "n_layers": ("layers", 24),
        "n_heads": ("heads", 16), "layer_norm_epsilon": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    fixed={
        "expansion_ratio": 4, "no_bias": True, "logit_scale": None, "embedding_fraction": 1.0,
        "norm_type": "low_precision_layernorm",
    },
    always=dict(
        norm="layernorm", gated=False, activation="gelu", bias=False, position="alibi", embedding_dropout=0.0,
        init="normal",
    ),
    read=read,
    write=write,
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    meaningless="learned_pos_emb init_device verbose resid_pdrop emb_pdrop",
)  # fmt: skip

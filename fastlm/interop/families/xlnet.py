"""XLNet (Yang et al. 2019), as transformers' XLNetLMHeadModel has it: its layers have biases of their own there,
whatever untie_r says. transformers knows no length that it was trained on; seq_len is the name in the authors' code.
"""

from fastlm.interop.family import Family, Parts, TensorSlice, affine
from fastlm.models import ModelConfig

LAYER = {"rel_attn.layer_norm": "attention_norm", "ff.layer_1": "mlp.inner", "ff.layer_2": "mlp.out",
         "ff.layer_norm": "mlp_norm"}  # fmt: skip
LEARNED = {"r_w_bias": "position.content_bias", "r_r_bias": "position.position_bias",
           "r_s_bias": "relative_segments.segment_bias", "seg_embed": "relative_segments.segment"}  # fmt: skip


def read(entries: dict) -> dict:
    clamp, dropout = max(entries.pop("clamp_len", -1), 0), entries.get("dropout", 0.1)
    return {
        "memory": entries.pop("mem_len", 512) or 0, "memory_reuse": entries.pop("reuse_len", None) or None,
        "position_options": {"untie": True, "clamp": clamp, "dropout": dropout},
    }  # fmt: skip


def write(c: ModelConfig) -> dict:
    return {
        "mem_len": c.memory or None, "reuse_len": c.memory_reuse, "clamp_len": c.position_options.get("clamp") or -1,
        "untie_r": True,
    }  # fmt: skip


def parts(c: ModelConfig) -> Parts:
    n = c.heads * c.head_width
    yield TensorSlice("transformer.word_embedding.weight", "embedding.weight")
    yield TensorSlice("transformer.mask_emb", "encoder.queries.start", layout="row")
    for i in range(c.layers):
        theirs, ours = f"transformer.layer.{i}", f"encoder.blocks.{i}"
        heads = dict(layout="transposed", heads=c.heads)
        for k, name in enumerate("qkv"):
            rows = slice(k * n, (k + 1) * n)
            yield TensorSlice(f"{theirs}.rel_attn.{name}", f"{ours}.attention.qkv.weight", rows, **heads)
        yield TensorSlice(f"{theirs}.rel_attn.o", f"{ours}.attention.out.weight", heads=c.heads)
        yield TensorSlice(f"{theirs}.rel_attn.r", f"{ours}.attention.position.project.weight", **heads)
        for name, own in LEARNED.items():
            yield TensorSlice(f"{theirs}.rel_attn.{name}", f"{ours}.attention.{own}")
        for name, own in LAYER.items():
            yield from affine(f"{theirs}.{name}", f"{ours}.{own}")
    if c.head == "lm":
        yield TensorSlice("lm_loss.bias", "head.bias")
        if not c.tie_embeddings:
            yield TensorSlice("lm_loss.weight", "head.weight")


XLNET = Family(
    "xlnet",
    {("lm", 0): "XLNetLMHeadModel", ("none", 0): "XLNetModel"},
    parts,
    options={
        "vocab_size": ("vocab_size", 32000), "seq_len": ("context", 512), "d_model": ("dim", 1024),
        "n_layer": ("layers", 24), "n_head": ("heads", 16), "d_head": ("head_dim", None), "d_inner": ("hidden", 4096),
        "ff_activation": ("activation", "gelu"), "layer_norm_eps": ("norm_eps", 1e-12),
        "dropout": ("dropout attention_dropout activation_dropout final_dropout", 0.1),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    fixed={"attn_type": "bi", "bi_data": False, "same_length": False},
    always=dict(
        kind="encoder", norm="layernorm", norm_place="post", gated=False, bias=True, qkv_bias=False, out_bias=False,
        head_bias=True, position="transformer-xl", relative_segments=True, two_streams=True, init="normal",
    ),
    read=read,
    write=write,
    prefix="transformer.",
    copies={"lm_loss.weight": "transformer.word_embedding.weight"},
    meaningless="untie_r use_mems_eval use_mems_train summary_type summary_use_proj summary_activation "
    "summary_last_dropout start_n_top end_n_top",
)  # fmt: skip

"""Llama (Touvron et al. 2023), and Mistral and Qwen 2, which have its tensors, as transformers' LlamaForCausalLM has
them.
"""

import math
from dataclasses import replace

from fastlm.interop.family import Family, Parts, TensorSlice, affine, heads, stacked
from fastlm.models import ModelConfig

# Ours → theirs, and the names of its options in both.
SCALINGS = {
    "interpolate": ("linear", {"factor": "factor"}),
    "yarn": ("yarn", {"factor": "factor", "original_context": "original_max_position_embeddings",
                      "beta_fast": "beta_fast", "beta_slow": "beta_slow"}),
    "llama3": ("llama3", {"factor": "factor", "original_context": "original_max_position_embeddings",
                          "low": "low_freq_factor", "high": "high_freq_factor"}),
}  # fmt: skip


def read_rope(entries: dict) -> dict:
    """Rotary options: rope_theta and rope_scaling of transformers 4, or rope_parameters of 5."""
    rope = (entries.pop("rope_scaling", None) or {}) | (entries.pop("rope_parameters", None) or {})
    base = entries.pop("rope_theta", None)
    options = {"base": float(rope.pop("rope_theta", None) or base or 10000.0)}
    old = rope.pop("type", "default")
    kind = rope.pop("rope_type", old)
    if kind != "default":
        named = {theirs: (ours, names) for ours, (theirs, names) in SCALINGS.items()}
        if kind not in named:
            raise LLAMA.refusal("rope_type", kind, f"ours scale by {', '.join(named)}")
        ours, names = named[kind]
        if "original_context" in names:
            rope.setdefault("original_max_position_embeddings", entries.get("max_position_embeddings", 2048))
        given = {name: rope.pop(theirs, None) for name, theirs in names.items()}
        options["scaling"] = {"kind": ours} | {name: value for name, value in given.items() if value is not None}
        if kind == "yarn":
            _yarn_as_published(rope, options["scaling"]["factor"])
    fraction = rope.pop("partial_rotary_factor", entries.pop("partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise LLAMA.refusal("partial_rotary_factor", fraction, "its heads turn all their channels")
    for name, value in rope.items():
        raise LLAMA.refusal(f"rope_parameters[{name!r}]", value, "no rotary scaling of ours has it")
    return {"position_options": options}


def _yarn_as_published(rope: dict, factor: float) -> None:
    """Take out what transformers lets one change of YaRN, and refuse where it was."""
    magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    published = {"attention_factor": magnitude, "mscale": None, "mscale_all_dim": None, "truncate": True}
    for name, value in published.items():
        given = rope.pop(name, value)
        if given is not None and (value is None or abs(given - value) > 1e-6):
            raise LLAMA.refusal(f"rope_parameters[{name!r}]", given, f"YaRN as published has {value}")


def write_rope(c: ModelConfig) -> dict:
    options = dict(c.position_options)
    entries = {"rope_theta": options.get("base", 10000.0), "rope_scaling": None}
    if "scaling" in options:
        kind, names = SCALINGS.get(options["scaling"]["kind"], (None, {}))
        defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "low": 1.0, "high": 4.0}
        given = {theirs: options["scaling"].get(name, defaults.get(name)) for name, theirs in names.items()}
        entries["rope_scaling"] = {"rope_type": kind, **given}
    return entries


def read(entries: dict) -> dict:
    attention, mlp = entries.pop("attention_bias", False), entries.pop("mlp_bias", False)
    if attention != mlp:
        raise LLAMA.refusal("attention_bias", attention, f"it has one field, bias, for that and mlp_bias, {mlp}")
    return {"bias": bool(mlp)} | read_rope(entries)


def write(c: ModelConfig) -> dict:
    if c.dim % c.heads:  # transformers 5 checks it, whatever head_dim says
        raise ValueError(f"Llama's heads divide its width; got {c.heads} and {c.dim}")
    return {"attention_bias": c.bias, "mlp_bias": c.bias} | write_rope(c)


def parts(c: ModelConfig) -> Parts:
    yield TensorSlice("model.embed_tokens.weight", "embedding.weight")
    for i in range(c.layers):
        theirs, ours = f"model.layers.{i}", f"decoder.blocks.{i}"
        yield from affine(f"{theirs}.input_layernorm", f"{ours}.attention_norm", bias=False)
        attention = f"{theirs}.self_attn"
        names = f"{attention}.q_proj {attention}.k_proj {attention}.v_proj"
        yield from heads(c, names, f"{ours}.attention.qkv", c.bias if c.qkv_bias is None else c.qkv_bias)
        yield from affine(f"{attention}.o_proj", f"{ours}.attention.out", c.bias)
        yield from affine(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", bias=False)
        inner = dict.fromkeys((f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"), c.mlp_width)
        yield from stacked(inner, f"{ours}.mlp.inner", c.bias)
        yield from affine(f"{theirs}.mlp.down_proj", f"{ours}.mlp.out", c.bias)
    yield from affine("model.norm", "decoder.norm", bias=False)
    if c.head == "lm" and not c.tie_embeddings:
        yield TensorSlice("lm_head.weight", "head.weight")


LLAMA = Family(
    "llama",
    {("lm", 0): "LlamaForCausalLM", ("none", 0): "LlamaModel"},
    parts,
    options={
        "vocab_size": ("vocab_size", 32000), "max_position_embeddings": ("context", 2048),
        "hidden_size": ("dim", 4096), "intermediate_size": ("hidden", 11008), "num_hidden_layers": ("layers", 32),
        "num_attention_heads": ("heads", 32), "num_key_value_heads": ("kv_heads", None),
        "head_dim": ("head_dim", None), "hidden_act": ("activation", "silu"), "rms_norm_eps": ("norm_eps", 1e-6),
        "attention_dropout": ("attention_dropout", 0.0), "tie_word_embeddings": ("tie_embeddings", False),
    },
    always=dict(norm="rmsnorm", gated=True, position="rope"),
    read=read,
    write=write,
    prefix="model.",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    meaningless="pretraining_tp",
    buffers=r"rotary_emb\.inv_freq$",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Mistral: every layer sees a window of tokens, itself among them


def read_mistral(entries: dict) -> dict:
    window = entries.pop("sliding_window", 4096)
    return {"windows": () if window is None else (window - 1,)} | read_rope(entries)


def write_mistral(c: ModelConfig) -> dict:
    return {"sliding_window": c.windows[0] + 1 if c.windows and c.windows[0] is not None else None} | write_rope(c)


MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architectures={("lm", 0): "MistralForCausalLM", ("none", 0): "MistralModel"},
    options=LLAMA.options | {
        "intermediate_size": ("hidden", 14336), "num_key_value_heads": ("kv_heads", 8),
        "max_position_embeddings": ("context", 131072),
    },
    always=LLAMA.always | dict(bias=False),
    read=read_mistral,
    write=write_mistral,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Qwen 2: biases of queries, keys and values; layers with and without a window


def read_qwen2(entries: dict) -> dict:
    used, window = entries.pop("use_sliding_window", False), entries.pop("sliding_window", 4096)
    layers, first = entries.get("num_hidden_layers", 32), entries.pop("max_window_layers", 28)
    kinds = entries.pop("layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not used or window is None:
        return {"windows": ()} | read_rope(entries)
    return {"windows": tuple(None if kind == "full_attention" else window - 1 for kind in kinds)} | read_rope(entries)


def write_qwen2(c: ModelConfig) -> dict:
    window = next((w for w in c.windows if w is not None), None)
    kinds = ["full_attention" if w is None else "sliding_attention" for w in c.windows or (None,) * c.layers]
    return {
        "use_sliding_window": window is not None, "sliding_window": None if window is None else window + 1,
        "max_window_layers": kinds.index("sliding_attention") if window is not None else c.layers,
        "layer_types": kinds,
    } | write_rope(c)  # fmt: skip


QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architectures={("lm", 0): "Qwen2ForCausalLM", ("none", 0): "Qwen2Model"},
    options=LLAMA.options | {
        "vocab_size": ("vocab_size", 151936), "intermediate_size": ("hidden", 22016),
        "num_key_value_heads": ("kv_heads", 32), "max_position_embeddings": ("context", 32768),
    },
    always=LLAMA.always | dict(bias=False, qkv_bias=True),
    read=read_qwen2,
    write=write_qwen2,
)  # fmt: skip

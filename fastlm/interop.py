"""Doors to Hugging Face: fastlm's attention in their models, and fastlm's weights in their format.

    register()                              AutoModel.from_pretrained(..., attn_implementation="fastlm")
    save_pretrained(model, folder)          config.json + model.safetensors; opens with AutoModel where such a model exists
    load_pretrained(folder)                 the way back

A Llama-shaped config is saved as "llama" and a GPT-2-shaped one as "gpt2". Other combinations of norm, MLP and position
have no Hugging Face model: they are saved as "fastlm", with fastlm's own names, for `load_pretrained`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.functional import attention
from fastlm.model import ModelConfig, Transformer

# ---------------------------------------------------------------------------------------------------------------------
# Attention in other people's models


def register() -> None:
    """Make attn_implementation="fastlm" known to transformers. Causal and bidirectional attention, grouped heads, dropout,
    T5's position bias, right-padding and growing caches are served; what is not is refused in words."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("fastlm", _attention)
    AttentionMaskInterface.register("fastlm", _mask)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """transformers' attention call: query [B, H, Lq, D], key, value [B, Hk, Lk, D] → ([B, Lq, H, D], no weights)."""
    for name in ("softcap", "sliding_window", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation='fastlm' does not serve {name} yet; use 'sdpa' or 'eager' for this model")
    if attention_mask is not None and attention_mask.ndim != 1:
        raise NotImplementedError(f"attn_implementation='fastlm' takes no dense mask; got one of shape {list(attention_mask.shape)}. Use 'sdpa' for it")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = kwargs.get("position_bias")  # T5's, which its model made dense
    out = attention(query, key, value, bias=bias, causal=causal, key_lengths=attention_mask, dropout=dropout, scale=scaling)
    return out.transpose(1, 2), None


def _mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, **kwargs) -> Tensor | None:
    """transformers' mask call: where theirs make an L×L tensor, ours gives key lengths [B], or None for no padding."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise NotImplementedError("attn_implementation='fastlm' serves causal and bidirectional masks; use 'sdpa' for windows and packed rows")
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length and mask_function is causal_mask_function:
        raise NotImplementedError("attn_implementation='fastlm' serves caches that grow; use the dynamic cache instead of a static one")
    if attention_mask is None:
        return None
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    if not torch.equal(attention_mask, torch.arange(attention_mask.shape[1], device=lengths.device) < lengths[:, None]):
        raise ValueError("attn_implementation='fastlm' takes padding on the right only; set tokenizer.padding_side = 'right'")
    return lengths


# ---------------------------------------------------------------------------------------------------------------------
# Weights in other people's format


class Part(NamedTuple):
    """One of their tensors is some rows of one of ours, transposed where theirs is stored [in, out]."""

    theirs: str
    ours: str
    rows: slice = slice(None)
    transposed: bool = False


def save_pretrained(model: Transformer, folder: Path | str, **entries) -> str:
    """Write config.json and model.safetensors into folder, a tied matrix once; return the config's model_type.

    entries: more of the config, such as eos_token_id and pad_token_id.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = model_type(model.config)
    state = model.state_dict()
    tensors = {}
    for theirs, ours, rows, transposed in PARTS[kind](model):
        part = state[ours][rows]
        tensors[theirs] = (part.T if transposed else part).contiguous().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": kind, "bos_token_id": None, "eos_token_id": None, **CONFIGS[kind](model.config), **entries}
    config["fastlm"] = asdict(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return kind


def load_pretrained(folder: Path | str) -> Transformer:
    """The Transformer that `save_pretrained` wrote, in evaluation mode. Raises ValueError for a folder it did not write."""
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json, so no model was saved there")
    config = json.loads((folder / "config.json").read_text())
    if "fastlm" not in config:
        raise ValueError(f"{folder / 'config.json'} was not written by fastlm: it has no 'fastlm' entry")
    model = Transformer(ModelConfig(**config["fastlm"]))
    saved = load_file(folder / "model.safetensors")
    pieces: dict[str, list[Tensor]] = {}
    for theirs, ours, _, transposed in PARTS[model_type(model.config)](model):
        if theirs not in saved:
            raise ValueError(f"{folder / 'model.safetensors'} lacks {theirs!r}, which its config calls for")
        pieces.setdefault(ours, []).append(saved[theirs].T if transposed else saved[theirs])
    state = {ours: torch.cat(parts) for ours, parts in pieces.items()}
    if model.config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    return model.eval()


def model_type(c: ModelConfig) -> str:
    """"llama", "gpt2", or "fastlm" where transformers has no such model."""
    if (c.norm, c.mlp, c.bias, c.position) == ("rmsnorm", "swiglu", False, "rope"):
        return "llama"
    plain_heads = c.kv_heads in (None, c.heads)
    if (c.norm, c.mlp, c.bias, c.position, c.tie_embeddings, plain_heads) == ("layernorm", "gelu", True, "learned", True, True):
        return "gpt2"
    return "fastlm"


def _llama_config(c: ModelConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "vocab_size": c.vocab_size, "max_position_embeddings": c.context,
        "hidden_size": c.dim, "intermediate_size": c.mlp_width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads, "head_dim": c.head_dim, "hidden_act": "silu", "rms_norm_eps": c.norm_eps,
        "rope_theta": 10000.0, "tie_word_embeddings": c.tie_embeddings, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": "float32",
    }  # fmt: skip


def _llama_parts(model: Transformer) -> Iterator[Part]:
    c = model.config
    q, kv, hidden = c.dim, c.head_dim * (c.kv_heads or c.heads), c.mlp_width
    yield Part("model.embed_tokens.weight", "embedding.weight")
    for i in range(c.layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        yield Part(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield Part(f"{theirs}.self_attn.q_proj.weight", f"{ours}.attention.qkv.weight", slice(0, q))
        yield Part(f"{theirs}.self_attn.k_proj.weight", f"{ours}.attention.qkv.weight", slice(q, q + kv))
        yield Part(f"{theirs}.self_attn.v_proj.weight", f"{ours}.attention.qkv.weight", slice(q + kv, q + 2 * kv))
        yield Part(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight")
        yield Part(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
        yield Part(f"{theirs}.mlp.gate_proj.weight", f"{ours}.mlp.inner.weight", slice(0, hidden))
        yield Part(f"{theirs}.mlp.up_proj.weight", f"{ours}.mlp.inner.weight", slice(hidden, 2 * hidden))
        yield Part(f"{theirs}.mlp.down_proj.weight", f"{ours}.mlp.out.weight")
    yield Part("model.norm.weight", "norm.weight")
    if not c.tie_embeddings:
        yield Part("lm_head.weight", "head.weight")


def _gpt2_config(c: ModelConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size, "n_positions": c.context, "n_embd": c.dim,
        "n_layer": c.layers, "n_head": c.heads, "n_inner": c.mlp_width, "activation_function": "gelu_new",
        "layer_norm_epsilon": c.norm_eps, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": 0.0,
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip


def _gpt2_parts(model: Transformer) -> Iterator[Part]:
    yield Part("transformer.wte.weight", "embedding.weight")
    yield Part("transformer.wpe.weight", "position.weight")
    layers = (("ln_1", "attention_norm"), ("attn.c_attn", "attention.qkv"), ("attn.c_proj", "attention.out"),
              ("ln_2", "mlp_norm"), ("mlp.c_fc", "mlp.inner"), ("mlp.c_proj", "mlp.out"))  # fmt: skip
    for i in range(model.config.layers):
        for theirs, ours in layers:
            matrix = theirs.startswith(("attn", "mlp"))  # their Conv1D keeps [in, out]
            yield Part(f"transformer.h.{i}.{theirs}.weight", f"blocks.{i}.{ours}.weight", transposed=matrix)
            yield Part(f"transformer.h.{i}.{theirs}.bias", f"blocks.{i}.{ours}.bias")
    for name in ("weight", "bias"):
        yield Part(f"transformer.ln_f.{name}", f"norm.{name}")


def _own_parts(model: Transformer) -> Iterator[Part]:
    for name in model.state_dict():
        if not (model.config.tie_embeddings and name == "head.weight"):
            yield Part(name, name)


CONFIGS = {"llama": _llama_config, "gpt2": _gpt2_config, "fastlm": lambda config: {}}
PARTS = {"llama": _llama_parts, "gpt2": _gpt2_parts, "fastlm": _own_parts}

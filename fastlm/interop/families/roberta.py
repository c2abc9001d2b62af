"""RoBERTa (Liu et al. 2019), as transformers' RobertaForMaskedLM has it: BERT's tensors, other names in the head, and
positions that count real tokens and start behind the padding token's id.
"""

from fastlm.interop.families.bert import (
    ALWAYS,
    BUFFERS,
    FIXED,
    OPTIONS,
    POOLER,
    embeddings,
    layers,
    lm_head,
    pair_head,
    shown,
)
from fastlm.interop.family import Family, Parts
from fastlm.models import ModelConfig


def read(entries: dict) -> dict:
    offset = entries.pop("pad_token_id", 1) + 1
    context = entries.pop("max_position_embeddings", 512) - offset
    return {"context": context, "position_options": {"offset": offset}}


def write(c: ModelConfig) -> dict:
    offset = c.position_options.get("offset", 0)
    return {"pad_token_id": offset - 1, "max_position_embeddings": c.context + offset}


def parts(c: ModelConfig) -> Parts:
    yield from embeddings(c, "roberta.")
    yield from layers(c, "roberta.")
    yield from pair_head(c, "roberta.pooler.dense")
    yield from lm_head(c, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight")


ROBERTA = Family(
    "roberta",
    {("lm", 0): "RobertaForMaskedLM", ("none", 0): "RobertaModel"},
    parts,
    options={name: option for name, option in OPTIONS.items() if name != "max_position_embeddings"}
    | {"vocab_size": ("vocab_size", 50265)},
    fixed=FIXED | {"hidden_act": "gelu"},  # its head has GELU whatever the layers have
    always=ALWAYS | dict(skip_padding=True, activation="gelu"),
    read=read,
    write=write,
    shown=shown,
    prefix="roberta.",
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    buffers=BUFFERS,
    pooler=POOLER,
)

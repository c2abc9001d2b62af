"""ELECTRA (Clark et al. 2020): its generator as transformers' ElectraForMaskedLM has it, and its discriminator as
ElectraForPreTraining does.
"""

from fastlm.interop.families.bert import ALWAYS, BUFFERS, FIXED, OPTIONS, embeddings, layers, lm_head
from fastlm.interop.family import Family, Parts, affine
from fastlm.models import ModelConfig


def parts(c: ModelConfig) -> Parts:
    yield from embeddings(c, "electra.")
    if c.embedding_width != c.dim:
        yield from affine("electra.embeddings_project", "encoder.project")
    yield from layers(c, "electra.")
    if c.head == "detection":
        yield from affine("discriminator_predictions.dense", "head.linear")
        yield from affine("discriminator_predictions.dense_prediction", "head.out")
    yield from lm_head(
        c, "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias",
        "generator_lm_head.weight",
    )  # fmt: skip


ELECTRA = Family(
    "electra",
    {("detection", 0): "ElectraForPreTraining", ("lm", 0): "ElectraForMaskedLM", ("none", 0): "ElectraModel"},
    parts,
    options=OPTIONS | {
        "embedding_size": ("embedding_dim", 128), "hidden_size": ("dim", 256), "num_attention_heads": ("heads", 4),
        "intermediate_size": ("hidden", 1024),
    },
    fixed=FIXED | {"hidden_act": "gelu"},  # its generator's head has GELU whatever the layers have
    always=ALWAYS,
    prefix="electra.",
    copies={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    buffers=BUFFERS,
    meaningless="summary_type summary_use_proj summary_activation summary_last_dropout",
)  # fmt: skip

"""What a preset learns, and how: each family's own objective, in its paper's variant."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fastlm.models import ModelConfig
from fastlm.models.presets import FAMILIES, FAMILY, PRESETS

Recipe = tuple[str, dict[str, object]]  # an objective's name in OBJECTIVES, and its options

# of a preset without a row of its own and of its family
BY_KIND: dict[str, Recipe] = {
    "decoder": ("causal", {}),
    "encoder": ("mlm", {}),
    "encoder-decoder": ("span-corruption", {}),
}
# a preset's name, or its family's
RECIPES: dict[str, Recipe] = {
    # Devlin et al. 2019, sec. 3.1
    "bert": ("nsp", {}),
    # Lan et al. 2020, sec. 4.1: runs of up to 3 whole words
    "albert": ("sop", {"whole_words": True, "ngram": 3}),
    # He et al. 2021's code: the same runs, without pairs
    "deberta": ("mlm", {"whole_words": True, "ngram": 3}),
    "deberta-v2": ("mlm", {"whole_words": True, "ngram": 3}),
    # Lewis et al. 2020, sec. 3: spans of 3 words on average over 30 % of the text, and all sentences permuted
    "bart": ("denoising", {}),
    # Song et al. 2019, sec. 3.2: half of the sentence
    "mass": ("mass", {}),
    # Yang et al. 2019, sec. 3.1: K = 6, spans of up to 5 tokens
    "xlnet": ("permutation", {}),
    # Clark et al. 2020: the generator's width is 1/4 in the small and large models, 1/3 in the base one; table 6
    "electra": ("replaced-tokens", {}),
    "electra-base": ("replaced-tokens", {"generator": {"width": 1 / 3}}),
    "electra-large": ("replaced-tokens", {"rate": 0.25}),
    # He et al. 2023, sec. 3.3: gradient-disentangled embeddings, a generator of half the depth with DeBERTa's decoder;
    # its code: <mask> in all places
    "deberta-v3": (
        "replaced-tokens",
        {"mask": 1.0, "sharing": "disentangled", "generator": {"width": 1.0, "depth": 0.5, "mask_decoder": True}},
    ),
}


class Small(NamedTuple):
    """What a family's small model is trained with instead, so that two minutes on two cores show it learn.

    Args:
        context: tokens in a row; None for the preset's. What predicts a token from both sides has first to learn which
            places are its neighbours, in many updates rather than many tokens: short rows make more of them.
        options: of the objective.
        lr: what the trainer's peak learning rate is multiplied by. Models whose norms come after the sum of a branch
            and the stream bear less (Xiong et al. 2020).
        memory: tokens of the rows before that it sees too; None for the preset's.
        batch: rows of a micro-batch; None for the trainer's. A label of a pair is one bit a row, and what tells it lies
            in two texts together: with 8 rows its gradient is noise.
        fields: more of a `ModelConfig` that changes. Two layers take half of the time of four, and norms after a branch
            let them learn in fewer updates; positions that begin as sines say a distance for all places at once; and
            matrices as small as those of models six times as wide copy no token ("xavier-sines").
    """

    context: int | None = None
    options: Mapping[str, object] = MappingProxyType({})
    lr: float = 1.0
    memory: int | None = None
    batch: int | None = None
    fields: Mapping[str, object] = MappingProxyType({})

    def shape(self, row: ModelConfig) -> dict[str, object]:
        """Fields of a preset that change: without dropout, for it sees no text often."""
        fields = {name: 0.0 for name in DROPOUTS if getattr(row, name)}
        if "dropout" in row.position_options:
            fields["position_options"] = row.position_options | {"dropout": 0.0}
        own = {name: value for name in ("context", "memory") if (value := getattr(self, name)) is not None}
        return fields | own | self.fields


DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "final_dropout")
_POST_NORM = Small(context=64, lr=0.4)
# each row teaches more where 40 % of its tokens are hidden (Wettig et al. 2023)
_MASKED = _POST_NORM._replace(options={"rate": 0.4})
_BERT_SINES, _XAVIER_SINES = ({"layers": 2, "init": f"{name}-sines"} for name in ("bert", "xavier"))
SMALL: dict[str, Small] = {
    "transformer-xl": Small(lr=0.4),
    # what two texts have in common is seen where little is hidden
    "bert": _POST_NORM._replace(batch=32, fields=_BERT_SINES),
    "roberta": _MASKED,
    "albert": _POST_NORM._replace(lr=0.6, batch=32, fields=_BERT_SINES),
    # as in Clark et al.'s large model; the generator is narrow, and bears more
    "electra": Small(context=64, options={"rate": 0.25}, lr=0.8),
    "electra-generator": _MASKED,
    "deberta": _MASKED,
    "deberta-v2": _MASKED,
    "deberta-v3": _POST_NORM,
    "deberta-v3-generator": _MASKED,
    # what stands on both sides of a token says more of it than the rows before, which take time
    "xlnet": _POST_NORM._replace(memory=0),
    # one <mask> for each token that is hidden, so that a token stands where it stood: gaps of unknown length and
    # sentences in disorder take longer
    "bart": Small(context=32, options={"spoil": "mask", "permute": False}, lr=0.6, fields=_XAVIER_SINES),
    "mass": _POST_NORM,
    "t5": Small(context=64),
    "t5-v1.1": Small(context=64),
}


def recipe(preset: str) -> Recipe:
    """The objective of a preset, and its options.

    Args:
        preset: a key of `PRESETS`.
    """
    names = [name for name in (preset, FAMILY[preset]) if name in RECIPES]
    objective, options = RECIPES[names[0]] if names else BY_KIND[PRESETS[preset].kind]
    own = small(preset)
    return objective, options if own is None else options | own.options


def small(preset: str) -> Small | None:
    """What a preset of a small model is trained with; None for a paper's size.

    Args:
        preset: a key of `PRESETS`.
    """
    return SMALL.get(preset, Small()) if preset in FAMILIES else None

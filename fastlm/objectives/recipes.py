"""What a preset learns, and how: each family's own objective, in its paper's variant."""

from typing import NamedTuple

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
    """What a family's small model is trained with instead, for two minutes on two cores to show that it learns.

    Args:
        shape: fields of `ModelConfig`, short rows and no dropout: a model that sees no text twice has no use for it.
        options: of the objective.
        lr: what the trainer's peak learning rate is multiplied by. Norms after the sum of a residual branch and its
            stream bear less (Xiong et al. 2020).
    """

    shape: dict[str, object] = {}  # noqa: RUF012
    options: dict[str, object] = {}  # noqa: RUF012
    lr: float = 1.0


_NO_DROPOUT = dict(dropout=0.0, attention_dropout=0.0)
_ENCODER = Small(dict(context=64, **_NO_DROPOUT), lr=0.4)
# with 40 % of the tokens hidden each row teaches more (Wettig et al. 2023)
_MASKED = _ENCODER._replace(options={"rate": 0.4})
SMALL: dict[str, Small] = {
    "bert": _MASKED,
    "roberta": _MASKED,
    "albert": _MASKED,
    "electra": _ENCODER,
    "electra-generator": _MASKED,
    "deberta": _MASKED,
    "deberta-v2": _MASKED,
    "deberta-v3": _ENCODER,
    "deberta-v3-generator": _MASKED,
    "xlnet": _ENCODER,
    "bart": _ENCODER,
    "mass": _ENCODER,
}


def recipe(preset: str) -> Recipe:
    """The objective of a preset, and its options.

    Args:
        preset: a key of `PRESETS`.
    """
    names = [name for name in (preset, FAMILY[preset]) if name in RECIPES]
    objective, options = RECIPES[names[0]] if names else BY_KIND[PRESETS[preset].kind]
    return objective, options | small(preset).options


def small(preset: str) -> Small:
    """What a preset of a small model is trained with; nothing of its own for a paper's size.

    Args:
        preset: a key of `PRESETS`.
    """
    return SMALL.get(preset, Small()) if preset in FAMILIES else Small()

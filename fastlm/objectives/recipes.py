"""What a preset learns: each family's own objective, in its paper's variant."""

from fastlm.models.presets import FAMILY, PRESETS

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


def recipe(preset: str) -> Recipe:
    """The objective of a preset, and its options.

    Args:
        preset: a key of `PRESETS`.
    """
    for name in (preset, FAMILY[preset]):
        if name in RECIPES:
            return RECIPES[name]
    return BY_KIND[PRESETS[preset].kind]

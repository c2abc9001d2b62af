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
RECIPES: dict[str, Recipe] = {}


def recipe(preset: str) -> Recipe:
    """The objective of a preset, and its options.

    Args:
        preset: a key of `PRESETS`.
    """
    for name in (preset, FAMILY[preset]):
        if name in RECIPES:
            return RECIPES[name]
    return BY_KIND[PRESETS[preset].kind]

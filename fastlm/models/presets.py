"""Models as rows of data. Each runs with every positional scheme; sizes are flags."""

from dataclasses import replace

from fastlm.models.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    # Touvron et al. 2023: RMSNorm, SwiGLU, rotary positions, no biases
    "llama": ModelConfig(),
    # Radford et al. 2019: LayerNorm, GELU, learned positions, biases, tied head
    "gpt": ModelConfig(norm="layernorm", mlp="gelu", bias=True, position="learned"),
}


def preset(name: str, **changes) -> ModelConfig:
    """The preset called `name`, some fields changed.

    Args:
        name: a key of PRESETS: "llama" or "gpt".
        changes: fields of `ModelConfig` with other values.

    Returns:
        A ModelConfig.

    Raises:
        ValueError: for a name that is not in PRESETS, and for values that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose from {', '.join(sorted(PRESETS))}")
    return replace(PRESETS[name], **changes)

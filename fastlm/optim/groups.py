"""Parameter groups: which tensors decay, and lower layers that learn more slowly."""

import re

from torch import Tensor, nn

from fastlm.optim import checks

RECIPES = ("gpt", "bert")


def decay_groups(model: nn.Module, weight_decay: float, recipe: str = "gpt") -> list[dict]:
    """Two parameter groups: tensors that decay, and tensors that do not. Frozen parameters are left out.

    Args:
        model: a module.
        weight_decay: of the first group, at least 0; the second has 0.
        recipe: "gpt": tensors of two or more dimensions decay, embeddings too; vectors and scalars (norms, biases,
            slopes) do not, as in GPT-2's and GPT-3's reproductions. "bert": everything decays but normalisation layers
            and biases, as in Google's BERT. Default "gpt".

    Returns:
        [{"params", "weight_decay"}, {"params", "weight_decay"}], for an optimizer.

    Raises:
        ValueError: for a negative weight_decay and an unknown recipe.
    """
    checks.at_least_zero(weight_decay=weight_decay)
    decays = _decays(model, recipe)
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p in decays], "weight_decay": weight_decay},
        {"params": [p for p in params if p not in decays], "weight_decay": 0.0},
    ]


def layer_groups(
    model: nn.Module, lr: float, layer_decay: float, weight_decay: float, recipe: str = "gpt"
) -> list[dict]:
    """Parameter groups whose lr falls by layer_decay from layer to layer, as for fine-tuning ELECTRA and BEiT.

    A parameter has lr · layer_decay^(layers below the top), and weight decay as `decay_groups` gives it. Its layer is
    the first number in its name. What comes before the first layer in the model (embeddings) is one below it;
    everything else (final norm, head) is at the top with the full lr.

    Args:
        model: a module.
        lr: learning rate at the top; at least 0.
        layer_decay: factor from a layer to the one below, in (0, 1]; 1 lets all layers learn alike.
        weight_decay: of the tensors that decay; at least 0.
        recipe: which tensors decay, as in `decay_groups`. Default "gpt".

    Returns:
        A list of {"params", "lr", "weight_decay"}, for an optimizer. Frozen parameters are left out.

    Raises:
        ValueError: for values out of range and an unknown recipe.
    """
    checks.at_least_zero(lr=lr, weight_decay=weight_decay)
    checks.positive(layer_decay=layer_decay)
    if layer_decay > 1:
        raise ValueError(f"layer_decay is {layer_decay}; it is at most 1, which lets all layers learn alike")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = [_layer(name) for name, _ in named]
    top = max((layer for layer in layers if layer is not None), default=-1) + 1
    first = next((i for i, layer in enumerate(layers) if layer is not None), 0)
    depth = [layer if layer is not None else -1 if i < first else top for i, layer in enumerate(layers)]
    decays, groups = _decays(model, recipe), {}
    for (_, p), level in zip(named, depth, strict=True):
        groups.setdefault((level, p in decays), []).append(p)
    return [
        {"params": params, "lr": lr * layer_decay ** (top - level), "weight_decay": weight_decay if decayed else 0.0}
        for (level, decayed), params in groups.items()
    ]


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found.group(1)) if found else None


def _decays(model: nn.Module, recipe: str) -> set[Tensor]:
    checks.one_of(RECIPES, recipe=recipe)
    if recipe == "gpt":
        return {p for p in model.parameters() if p.ndim >= 2}
    owned = [(module, name, p) for module in model.modules() for name, p in module.named_parameters(recurse=False)]
    # in_proj_bias, bias_ih_l0
    return {p for module, name, p in owned if "bias" not in name and "norm" not in type(module).__name__.lower()}

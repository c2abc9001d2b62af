"""How a model's weights are drawn, by name. A scheme of positions draws its own parameters, whatever the name, but for
learned positions that begin as sines ("bert-sines", "xavier-sines").

A way draws one matrix at a time, knowing its name and the model's config; biases start as zeros and norms as ones. To
add one, register a function here.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastlm.positions import Sinusoidal

if TYPE_CHECKING:
    from fastlm.models.config import ModelConfig

INITS: dict[str, Callable[[str, Tensor, "ModelConfig"], None]] = {}


def init(name: str) -> Callable:
    """Register a function of (a parameter's name, the parameter, config) that draws the parameter in place."""

    def register(draw: Callable) -> Callable:
        INITS[name] = draw
        return draw

    return register


def init_weights(model: nn.Module, config: "ModelConfig") -> None:
    """Draw every weight of a model but its positional schemes' own; none on the meta device, which has no numbers.

    Args:
        model: a `Transformer`.
        config: its shape; config.init says how.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            sines = config.init.endswith("-sines") and config.position == "learned" and name.endswith("position.weight")
            scheme = "position." in name or ".relative_segments." in name
            if p.is_meta or (scheme and not sines):  # schemes have drawn their own
                continue
            if p.ndim >= 2:
                INITS[config.init](name, p, config)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1)


def writes_to_stream(name: str) -> bool:
    """Whether a matrix's product is added to the residual stream."""
    return name.endswith(("attention.out.weight", "cross.out.weight", "mlp.out.weight"))


def branches(config: "ModelConfig") -> int:
    """Residual branches of a decoder, or of an encoder that stands alone."""
    return (3 if config.kind == "encoder-decoder" else 2) * config.layers * config.group_blocks


@init("gpt2")
def _gpt2(name: str, p: Tensor, config: "ModelConfig") -> None:
    """N(0, 0.02); matrices that write to the residual stream divided by √branches (Radford et al. 2019)."""
    p.normal_(std=0.02 / math.sqrt(branches(config)) if writes_to_stream(name) else 0.02)


@init("normal")
def _normal(name: str, p: Tensor, config: "ModelConfig") -> None:
    """N(0, 0.02) throughout."""
    p.normal_(std=0.02)


@init("bert")
def _bert(name: str, p: Tensor, config: "ModelConfig") -> None:
    """N(0, 0.02) cut at two standard deviations (Devlin et al. 2019)."""
    nn.init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04)


@init("xavier")
def _xavier(name: str, p: Tensor, config: "ModelConfig") -> None:
    """Uniform with variance 2/(fan in + fan out) for each matrix of its own (Glorot and Bengio 2010); embeddings have
    N(0, 1/width).
    """
    if "embedding" in name or "types" in name:
        p.normal_(std=p.shape[1] ** -0.5)
        return
    for part in _parts(name, p, config):
        nn.init.xavier_uniform_(part)


@init("bert-sines")
def _bert_sines(name: str, p: Tensor, config: "ModelConfig") -> None:
    """As "bert"; learned positions begin as sines and cosines (Vaswani et al. 2017) as large as the other embeddings.
    A distance is then one product for all places, and need not be learned place by place (compare Trockman and Kolter
    2023).
    """
    _sines(p, 0.02) if name.endswith("position.weight") else _bert(name, p, config)


@init("xavier-sines")
def _xavier_sines(name: str, p: Tensor, config: "ModelConfig") -> None:
    """As "xavier"; learned positions as in "bert-sines"."""
    _sines(p, p.shape[1] ** -0.5) if name.endswith("position.weight") else _xavier(name, p, config)


def _sines(p: Tensor, size: float) -> None:
    """Sinusoidal positions in p [positions, width], whose root mean square is `size`."""
    p.copy_(Sinusoidal(p.shape[1]).embed(torch.arange(len(p), device=p.device)) * size * math.sqrt(2))


@init("lecun")
def _lecun(name: str, p: Tensor, config: "ModelConfig") -> None:
    """N(0, 1/fan in) (LeCun et al. 1998); embeddings have N(0, 1/width), which is the same rule for a tied head."""
    p.normal_(std=p.shape[1] ** -0.5)


@init("depth-scaled")
def _depth_scaled(name: str, p: Tensor, config: "ModelConfig") -> None:
    """Glorot's rule, layer l's matrices times 1/√l, counted from 1 (Zhang et al. 2019, DS-Init)."""
    _xavier(name, p, config)
    if ".blocks." in name:
        layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
        p.mul_(layer**-0.5)


@init("t-fixup")
def _t_fixup(name: str, p: Tensor, config: "ModelConfig") -> None:
    """Glorot's rule, with embeddings N(0, 1/dim), and what carries values through a branch made smaller with depth, so
    that training needs no warmup (Huang et al. 2020): times (9N)^(-1/4) in a decoder of N layers, 0.67 · N^(-1/4) in an
    encoder.
    """
    _xavier(name, p, config)
    encoder = name.startswith("encoder")
    layers = (config.encoder_layers or config.layers) if encoder else config.layers
    factor = 0.67 * layers**-0.25 if encoder else (9 * layers) ** -0.25
    if name == "embedding.weight":
        p.mul_((9 * config.layers) ** -0.25)
    elif ".mlp." in name or writes_to_stream(name):
        p.mul_(factor)
    elif name.endswith(("qkv.weight", "kv.weight")):
        _parts(name, p, config)[-1].mul_(factor)  # the values


@init("t5")
def _t5(name: str, p: Tensor, config: "ModelConfig") -> None:
    """Embeddings N(0, 1), matrices N(0, 1/fan in), and queries 1/√(dim · head width), for T5's scores are not scaled
    (Raffel et al. 2020's code). An untied head is drawn like a matrix, so that the first loss is near ln V.
    """
    if name == "embedding.weight":
        p.normal_()
        return
    p.normal_(std=p.shape[1] ** -0.5)
    if name.endswith(("qkv.weight", ".q.weight")):
        _parts(name, p, config)[0].mul_(config.head_width**-0.5)


def _parts(name: str, p: Tensor, config: "ModelConfig") -> tuple[Tensor, ...]:
    """The matrices that a parameter holds one below the other: queries, keys and values; gate and up."""
    q, kv = config.heads * config.head_width, (config.kv_heads or config.heads) * config.head_width
    if name.endswith(".qkv.weight"):
        return p.split((q, kv, kv))
    if name.endswith(".kv.weight"):
        return p.split((kv, kv))
    if name.endswith("mlp.inner.weight") and config.gated:
        return p.chunk(2)
    return (p,)

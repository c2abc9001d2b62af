"""What a block moves through memory in training, forward and backward: bytes read and written for each token, by kind.

    python benchmarks/traffic.py                        # a preset of each family that transformers has too, in bf16
    python benchmarks/traffic.py gpt2 t5-base --dtype float32

Nothing is computed: two layers and one, of transformers' model and of ours, are traced on tensors without storage, and
their difference is a block; of encoder–decoders, one of each. Every operator that PyTorch dispatches counts the tensors
it is given, read once, and those it makes or changes, written once. A view moves nothing, and what strides of 0 repeat
counts once. That is the least that operators move where what lies between them leaves the cache, as at these sizes, and
ours are counted alike. What tiles read again, of products and attention, is not in it, for either side; products inside
of eager attention are products here. "Limit" is ours without all that is neither product nor attention. transformers
attends by scaled_dot_product_attention where its model can, and eagerly where it cannot. Ours keeps the feed-forward
layer's activation here, as always where somebody looks on; else it is computed once more, a pass that is not counted.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout built in place, unless fastlm is installed
import fastlm
from fastlm.interop import model_type
from fastlm.interop.families import FAMILIES
from fastlm.models import ModelConfig, Transformer
from fastlm.models.presets import preset

TOKENS = 16384
THEIRS, OURS = "transformers", "fastlm"
SHOWN = (
    "gpt2", "llama2-7b", "mistral-7b", "qwen2-7b", "bloom-560m", "mpt-7b", "bert-base", "roberta-base", "albert-base",
    "electra-base", "deberta-base", "xlnet-base", "bart-base", "t5-base", "t5-v1.1-base",
)  # fmt: skip
# kind → what operators of it are named, or begin with; the first that fits
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "attention": ("attention", "_scaled_dot_product", "_softmax", "rotate"),
    "norms": ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "mean", "rsqrt", "pow"),
    "copies": ("clone", "copy", "_to_copy", "cat", "stack", "repeat"),
    "sums": ("sum",),
}
REST = "elementwise"
LIMIT = ("products", "attention")


class Traffic(TorchDispatchMode):
    """Counts what the operators in its `with` block read and write, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tensors(args, kwargs)
        made = func(*args, **(kwargs or {}))
        self.bytes[kind(func)] += moved(func, given, tensors(made))
        return made


def tensors(*values: object) -> list[Tensor]:
    """Those among the values, each once."""
    return list({id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def moved(func: Callable, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes of a call of an operator."""
    writes = func._schema.is_mutable
    if func._schema.name.split("::")[1].startswith(("empty", "new_empty")):
        return 0
    places = {x.untyped_storage()._cdata for x in given}
    fresh = [x for x in made if x.untyped_storage()._cdata not in places]
    if not fresh and not writes:
        return 0  # a view
    changed = [x for x in made if x.untyped_storage()._cdata in places] if writes else []
    return sum(map(size, [*given, *fresh, *changed]))


def size(x: Tensor) -> int:
    """Bytes of x in memory, of what is repeated once."""
    elements = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        elements *= n if stride else min(n, 1)
    return elements * x.element_size()


def kind(func: Callable) -> str:
    name = func._schema.name.split("::")[1]
    for known, begins in KINDS.items():
        if name.removesuffix("_") in begins or name.startswith(tuple(f"{b}_" for b in begins)):
            return known
    return REST


def of_block(make: Callable[[int], Callable[[], Tensor]]) -> Counter[str]:
    """What one layer moves. make(layers) → what computes a model's answer, forward."""
    counts = []
    for layers in (1, 2):
        run = make(layers)
        with Traffic() as traffic:
            run().sum().backward()
        counts.append(traffic.bytes)
    counts[1].subtract(counts[0])
    return counts[1]


def sides(name: str) -> Iterator[tuple[str, Callable[[int], Callable[[], Tensor]]]]:
    """(side, what makes its model of so many layers, in training and without dropout)."""
    config = preset(name)
    L = min(1024, config.context)

    def tokens() -> Tensor:
        return torch.zeros(TOKENS // L, L, dtype=torch.long)

    def ours(layers: int) -> Callable[[], Tensor]:
        model, ids = Transformer(shape(config, layers)).train(), tokens()
        more = {"decoder_tokens": ids} if config.kind == "encoder-decoder" else {}
        return lambda: model.states(ids, **more)

    def theirs(layers: int) -> Callable[[], Tensor]:
        model, ids = transformers_model(shape(config, layers)).train(), tokens()
        more = {"decoder_input_ids": ids} if config.kind == "encoder-decoder" else {}
        more |= {"use_mems": False} if hasattr(model.config, "mem_len") else {"use_cache": False}
        return lambda: model(input_ids=ids, **more)[0]

    yield THEIRS, theirs
    yield OURS, ours


def shape(config: ModelConfig, layers: int) -> ModelConfig:
    without = {name: 0.0 for name in vars(config) if name.endswith("dropout") and getattr(config, name)}
    options = {k: v for k, v in config.position_options.items() if k != "dropout"}
    return ModelConfig(**vars(config) | without | {"layers": layers, "position_options": options, "init": "normal"})


def transformers_model(config: ModelConfig) -> nn.Module:
    import transformers

    entries = FAMILIES[model_type(config)].entries(config)
    kind = getattr(transformers, entries.pop("architectures")[0])
    entries.pop("model_type")
    attention = "sdpa" if kind._supports_sdpa else "eager"
    return kind._from_config(kind.config_class(**entries), attn_implementation=attention)


def traced(name: str) -> tuple[dict[str, Counter[str]], dict[str, str]]:
    """What a block of each side moves; and of sides whose model cannot be traced in this dtype, why."""
    blocks, failed = {}, {}
    for side, make in sides(name):
        try:
            # definitions, so that each op of ours is one operator whatever its size
            with FakeTensorMode(allow_non_fake_inputs=True), fastlm.use_backend("reference"):
                blocks[side] = of_block(make)
        except Exception as error:  # theirs may raise anything; ours may not
            if side == OURS:
                raise
            failed[side] = f"{type(error).__name__}: {error}".splitlines()[0]
    return blocks, failed


def line(name: str, side: str, block: Counter[str], limit: float) -> str:
    per_token = [block[known] / TOKENS / 1024 for known in (*KINDS, REST)]
    total = sum(per_token)
    return f"| {name} | {side} | {' | '.join(f'{x:.1f}' for x in (*per_token, total))} | {total / limit:.2f} |"


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("presets", nargs="*", default=SHOWN)
    ask.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    asked = ask.parse_args()
    torch.set_default_dtype(getattr(torch, asked.dtype))
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # of models that cannot be traced
    print(f"KiB a token, {asked.dtype}, {TOKENS:,} tokens in rows of up to 1,024\n")
    print(f"| | | {' | '.join((*KINDS, REST))} | all | over the limit |")
    print("|---" * (len(KINDS) + 5) + "|")
    for name in asked.presets:
        blocks, failed = traced(name)
        limit = sum(blocks[OURS][known] for known in LIMIT) / TOKENS / 1024
        for side, block in blocks.items():
            print(line(name, side, block, limit), flush=True)
        for side, why in failed.items():
            print(f"| {name} | {side} | left out: {why} |", flush=True)


if __name__ == "__main__":
    main()

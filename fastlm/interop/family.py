"""What a family of Hugging Face's models is to us: its config.json in our terms, and its tensors as rows of ours."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastlm import positions
from fastlm.models import ModelConfig
from fastlm.positions import frequencies

# Ours → the names that transformers has for it, the one that we write first.
ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
    "tanh": ("tanh",),
}
# What any family's config may ask for and no model of ours does.
UNSERVED = {"quantization_config": None, "is_decoder": False, "add_cross_attention": False,
            "tie_encoder_decoder": False, "pruned_heads": {}}  # fmt: skip
# Entries of any config.json that say nothing of what a model computes: names, labels, training and generation.
WITHOUT_MEANING = {
    "_name_or_path", "_commit_hash", "_attn_implementation_autoset", "model_type", "transformers_version",
    "torch_dtype", "dtype", "tokenizer_class", "finetuning_task", "task_specific_params", "problem_type", "id2label",
    "label2id", "num_labels", "prefix", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
    "output_past", "output_scores", "return_dict_in_generate", "torchscript", "tf_legacy_loss", "use_bfloat16",
    "chunk_size_feed_forward", "gradient_checkpointing", "is_encoder_decoder", "cross_attention_hidden_size",
    "initializer_range", "initializer_factor", "init_std", "directionality", "classifier_dropout",
    "classifier_dropout_prob", "classif_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "num_beam_groups", "diversity_penalty",
}  # fmt: skip

LAYOUTS: dict[str, tuple[Callable, Callable]] = {  # how theirs is kept → (of ours, the way back)
    "same": (lambda x: x, lambda x: x),
    "transposed": (Tensor.t, Tensor.t),
    "row": (lambda x: x[None], lambda x: x[0]),
}


class TensorSlice(NamedTuple):
    """One of their tensors is some rows of one of ours.

    Args:
        theirs: the tensor's name in their files.
        ours: the parameter's name in our state dict.
        rows: of ours, in their order; a slice or indices. Default all.
        layout: of theirs, against ours: "same", "transposed" for [in, out], "row" for [1, n]. Default "same".
        heads: where theirs ends in [heads, head_dim], its heads. None: it has no such two dimensions.
    """

    theirs: str
    ours: str
    rows: slice | Tensor = slice(None)
    layout: Literal["same", "transposed", "row"] = "same"
    heads: int | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """Their tensor, made from our parameter."""
        made = LAYOUTS[self.layout][0](parameter[self.rows])
        return made if self.heads is None else made.unflatten(-1, (self.heads, -1))

    def back(self, tensor: Tensor) -> Tensor:
        """Our rows, made from their tensor."""
        return LAYOUTS[self.layout][1](tensor if self.heads is None else tensor.flatten(-2))


Parts = Iterator[TensorSlice]


def affine(theirs: str, ours: str, bias: bool = True, rows: slice | Tensor = slice(None), layout="same") -> Parts:
    """A linear layer or a norm: its weight, and its bias where there is one."""
    yield TensorSlice(f"{theirs}.weight", f"{ours}.weight", rows, layout)
    if bias:
        yield TensorSlice(f"{theirs}.bias", f"{ours}.bias", rows)


def stacked(theirs: dict[str, int], ours: str, bias: bool = True) -> Parts:
    """Linear layers of theirs, name → outputs, which are one of ours, one below the other."""
    start = 0
    for name, size in theirs.items():
        yield from affine(name, ours, bias, slice(start, start + size))
        start += size


def heads(c: ModelConfig, names: str, ours: str, bias: bool = True) -> Parts:
    """Projections to heads: names is "query key value" of a self-attention, or "key value"."""
    sizes = [c.heads * c.head_width, *[(c.kv_heads or c.heads) * c.head_width] * 2]
    names = names.split()
    return stacked(dict(zip(names, sizes[-len(names) :], strict=True)), ours, bias)


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face's models, which a config of ours belongs to if it survives the way there and back.

    Args:
        model_type: its name in config.json.
        architectures: (head, pair_labels) of ours → the class that has these heads; ("none", 0) → the base model.
        parts: its tensors, for a config.
        encoder: the class that is an encoder–decoder's encoder alone; "" for none.
        options: their option → (our field or fields, transformers' default).
        fixed: their option → the one value that we have, which is transformers' default.
        always: our fields for which the family has no option.
        read: takes from a config's entries what the tables do not say, and returns fields of ours.
        write: the way back.
        shown: fields of ours that no option says, from our config and the names of the tensors.
        unread: what a config of ours computes with and transformers leaves unread in the file; None for nothing.
        prefix: of the base model's tensors where a head stands above it.
        copies: a tensor that repeats another one → that one.
        renamed: pattern of other names that tensors have in files → the name in parts.
        buffers: pattern of tensors in files that are no parameters.
        pooler: pattern of the base model's tensors that only some heads read.
        meaningless: options, one word each, that change nothing of what a model computes.
    """

    model_type: str
    architectures: dict[tuple[str, int], str]
    parts: Callable[[ModelConfig], Parts]
    encoder: str = ""
    options: dict[str, tuple[str, Any]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    always: dict[str, Any] = field(default_factory=dict)
    read: Callable[[dict], dict] = lambda entries: {}
    write: Callable[[ModelConfig], dict] = lambda config: {}
    shown: Callable[[ModelConfig, set[str]], dict] = lambda config, names: {}
    unread: Callable[[ModelConfig], str | None] = lambda config: None
    prefix: str = ""
    copies: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    buffers: str = "$^"
    pooler: str = "$^"
    meaningless: str = ""

    def config(self, entries: dict) -> ModelConfig:
        """Our config for the entries of a config.json.

        Raises:
            ValueError: for an option that we do not have.
        """
        entries = dict(entries)  # what is understood is taken out
        for name, value in (UNSERVED | self.fixed).items():
            if (given := entries.pop(name, value)) not in (value, None):
                raise self.refusal(name, given, f"ours has {value!r}")
        fields = dict(self.always) | self.read(entries)
        for name, (ours, default) in self.options.items():
            value = entries.pop(name, default)
            for each in ours.split():
                read = self._activation(name, value) if each.endswith("activation") else value
                if fields.setdefault(each, read) != read:
                    raise self.refusal(name, value, f"another of its options gave our {each} as {fields[each]!r}")
        made = entries.pop("architectures", None) or ()
        named = (heads for heads, name in self.architectures.items() if name in made)
        fields["head"], fields["pair_labels"] = next(named, next(iter(self.architectures)))
        if self.encoder in made:
            fields |= dict(kind="encoder", head="none", layers=fields.pop("encoder_layers"))
        if unknown := sorted(entries.keys() - {*WITHOUT_MEANING, *self.meaningless.split()}):
            warnings.warn(f"fastlm does not know {', '.join(unknown)} of {self.model_type}'s config", stacklevel=3)
        with torch.device("meta"):
            return ModelConfig(**fields)

    def entries(self, config: ModelConfig) -> dict:
        """The entries of a config.json, for a config of this family."""
        c, alone = resolved(config), self.encoder and config.kind == "encoder"
        made = {"architectures": [self.encoder if alone else self.architectures[c.head, c.pair_labels]]}
        if alone:
            c = replace(c, kind="encoder-decoder", encoder_layers=c.layers)
        for name, (ours, _) in self.options.items():
            value = getattr(c, ours.split()[0])
            made[name] = ACTIVATIONS[value][0] if ours.endswith("activation") else value
        return {"model_type": self.model_type, **made, **self.write(c)}

    def has(self, config: ModelConfig) -> bool:
        """Whether a config belongs to the family."""
        if (config.head, config.pair_labels) not in self.architectures:
            return False
        try:
            read = self.config(self.entries(config))
            shown = {name: getattr(config, name) for name in self.shown(read, set())}
            if resolved(replace(read, **shown)) != resolved(config):
                return False
            return self.shown(config, {part.theirs for part in self.parts(config)}) == shown
        except (TypeError, ValueError):  # there is nothing that says it in their config
            return False

    def alone(self) -> "Family":
        """The family with the names that a base model has where no head stands above it."""
        bare = lambda name: name.removeprefix(self.prefix)
        parts = lambda config: (part._replace(theirs=bare(part.theirs)) for part in self.parts(config))
        return replace(self, parts=parts, copies={bare(copy): bare(of) for copy, of in self.copies.items()}, prefix="")

    def refusal(self, name: str, value: object, why: str) -> ValueError:
        return ValueError(
            f"{self.model_type}'s config has {name} {value!r}, which fastlm.models.Transformer cannot be: {why}; "
            "open it with transformers.AutoModel"
        )

    def _activation(self, name: str, value: str) -> str:
        for ours, names in ACTIVATIONS.items():
            if value in names:
                return ours
        raise self.refusal(name, value, f"the activations are {', '.join(sum(ACTIVATIONS.values(), ()))}")


def resolved(c: ModelConfig) -> ModelConfig:
    """The same model with its defaults written out, and with theirs in fields that nothing reads: equal configs for
    equal models, however their weights were drawn.
    """
    said = lambda value, default: default if value is None else value
    changes = dict(
        kv_heads=said(c.kv_heads, c.heads), head_dim=c.head_width, hidden=c.mlp_width, embedding_dim=c.embedding_width,
        qkv_bias=said(c.qkv_bias, c.bias), out_bias=said(c.out_bias, c.bias),
        norm_bias=c.norm == "layernorm" and said(c.norm_bias, c.bias),
        final_norm=said(c.final_norm, c.norm_place == "pre"), embedding_dropout=said(c.embedding_dropout, c.dropout),
        attention_scale=None if c.attention_scale == c.head_width**-0.5 else c.attention_scale,
        shared_groups=None if c.shared_groups == c.layers else c.shared_groups,
        windows=_each_layers_window(c),
        position_options=_named_options(positions.SCHEMES[c.position], c.position_options), init="gpt2",
    )  # fmt: skip
    if c.kind == "encoder-decoder":
        changes["encoder_layers"] = said(c.encoder_layers, c.layers)
    if not c.conv_width:
        changes |= dict(conv_groups=1, conv_activation="gelu")
    if c.head != "lm":
        changes |= dict(head_transform=False, head_bias=False, tie_embeddings=True, scale_logits=False)
    with torch.device("meta"):  # a config makes its scheme to check it
        return replace(c, **changes)


def _each_layers_window(c: ModelConfig) -> tuple[int | None, ...]:
    each = tuple(c.windows[i % len(c.windows)] for i in range(c.layers)) if c.windows else ()
    return () if set(each) == {None} else each


def _named_options(scheme: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """Those of a scheme's options that are not its defaults."""
    defaults = {name: p.default for name, p in inspect.signature(scheme).parameters.items()}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    options = {name: value for name, value in options.items() if value != defaults[name]}
    if isinstance(scaling := options.get("scaling"), dict):
        named = dict(scaling)
        kind = named.pop("kind")
        options["scaling"] = {"kind": kind, **_named_options(frequencies.SCALINGS[kind], named)}
    return options

"""Heads for fine-tuning from and to Hugging Face's format: AutoModelForSequenceClassification and
AutoModelForQuestionAnswering open what is written here, and theirs open as ours.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastlm.interop.families import FAMILIES
from fastlm.interop.family import Parts, affine
from fastlm.interop.weights import model_type, opened, tensors_of, transformer, write
from fastlm.models import ModelConfig, Transformer
from fastlm.models.heads import POOLINGS, RowClassifier, SpanReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Head(NamedTuple):
    """A family's head.

    Args:
        architecture: the class in transformers that has it.
        out: its last layer.
        dense: its dense layer, or None.
        pooling: how its classifier reads a row, as in `POOLINGS`; None for what reads each token.
        base: what stands before the base model's names, in place of the family's prefix. None: that prefix.
    """

    architecture: str
    out: str
    dense: str | None = None
    pooling: str | None = None
    base: str | None = None

    def parts(self) -> Parts:
        """Its tensors, ours named as in the head's state dict."""
        if self.dense is not None:
            yield from affine(self.dense, "dense")
        yield from affine(self.out, "out", bias=self.pooling is None or self.dense is not None)


def _rows(architecture: str, dense: str | None, out: str, pooling: str, base: str | None = None) -> Head:
    return Head(f"{architecture}ForSequenceClassification", out, dense, pooling, base)


def _spans(architecture: str, base: str | None = None) -> Head:
    return Head(architecture, "qa_outputs", base=base)


# model_type → the head of each
ROWS: dict[str, Head] = {
    "bert": _rows("Bert", "bert.pooler.dense", "classifier", "bert"),
    "albert": _rows("Albert", "albert.pooler", "classifier", "bert"),
    "roberta": _rows("Roberta", "classifier.dense", "classifier.out_proj", "roberta"),
    "electra": _rows("Electra", "classifier.dense", "classifier.out_proj", "electra"),
    "deberta": _rows("Deberta", "pooler.dense", "classifier", "deberta"),
    "deberta-v2": _rows("DebertaV2", "pooler.dense", "classifier", "deberta"),
    "xlnet": _rows("XLNet", "sequence_summary.summary", "logits_proj", "xlnet"),
    "bart": _rows("Bart", "classification_head.dense", "classification_head.out_proj", "bart"),
    "gpt2": _rows("GPT2", None, "score", "gpt2"),
    "llama": _rows("Llama", None, "score", "gpt2"),
    "mistral": _rows("Mistral", None, "score", "gpt2"),
    "qwen2": _rows("Qwen2", None, "score", "gpt2"),
    "bloom": _rows("Bloom", None, "score", "gpt2"),
    "mpt": _rows("Mpt", None, "score", "gpt2"),
}
SPANS: dict[str, Head] = {
    "bert": _spans("BertForQuestionAnswering"),
    "albert": _spans("AlbertForQuestionAnswering"),
    "roberta": _spans("RobertaForQuestionAnswering"),
    "electra": _spans("ElectraForQuestionAnswering"),
    "deberta": _spans("DebertaForQuestionAnswering"),
    "deberta-v2": _spans("DebertaV2ForQuestionAnswering"),
    "xlnet": _spans("XLNetForQuestionAnsweringSimple"),
    "bart": _spans("BartForQuestionAnswering"),
    "gpt2": _spans("GPT2ForQuestionAnswering"),
    "llama": _spans("LlamaForQuestionAnswering", "transformer."),
    "mistral": _spans("MistralForQuestionAnswering"),
    "qwen2": _spans("Qwen2ForQuestionAnswering", "transformer."),
    "bloom": _spans("BloomForQuestionAnswering"),
    "mpt": _spans("MptForQuestionAnswering"),
}
BY_KIND = {"encoder": "bert", "decoder": "gpt2", "encoder-decoder": "bart"}  # poolings where there is no such head


def pooling_of(config: ModelConfig) -> str:
    """How rows of a model of this shape are read, as in `POOLINGS`: as its family does, or as one of its kind does."""
    head = ROWS.get(model_type(bare(config)))
    return BY_KIND[config.kind] if head is None else head.pooling


def bare(config: ModelConfig) -> ModelConfig:
    """The shape without the heads of pretraining, which another head stands in the place of."""
    return replace(config, head="none", pair_labels=0, pooler=False, mask_decoder=False)


def architecture_of(model: RowClassifier | SpanReader) -> str | None:
    """The class of transformers that opens what is written of a model; None for fastlm's own format."""
    head = _head(model)
    return None if head is None else head.architecture


def head_to_huggingface(model: RowClassifier | SpanReader, directory: Path | str, **entries: Any) -> str:
    """Write a model with a head for fine-tuning: config.json and model.safetensors.

        fastlm.interop.head_to_huggingface(classifier, "mine", pad_token_id=0, id2label={0: "no", 1: "yes"})
        transformers.AutoModelForSequenceClassification.from_pretrained("mine")

    Args:
        model: a `RowClassifier` or a `SpanReader`.
        directory: where; made if it is not there.
        entries: more of config.json, such as id2label, label2id and pad_token_id.

    Returns:
        The config's model_type; "fastlm" where transformers has no such model with such a head, which
        `head_from_huggingface` alone reads.

    Raises:
        OSError, ValueError: as `to_huggingface`.
    """
    config, inner, head = bare(model.config), model.model, _head(model)
    classifies = isinstance(model, RowClassifier)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.")}
    if head is None:
        family = FAMILIES["fastlm"]
        fields = {"architectures": [type(model).__name__], "fastlm": asdict(config)}
        if classifies:
            pooling = next(name for name, pooling in POOLINGS.items() if pooling == model.pooling)
            fields["head"] = {"labels": model.labels, "pooling": pooling, "end": model.end}
        tensors = {f"model.{name}": x for name, x in inner.state_dict().items()} | own
        tensors = {name: x.contiguous().clone() for name, x in tensors.items()}
        write(Path(directory), family, {"model_type": "fastlm"} | fields, entries, tensors)
        return "fastlm"
    kind = model_type(config)
    family = FAMILIES[kind]
    renamed = lambda name: name if head.base is None else head.base + name.removeprefix(family.prefix)
    with torch.device("meta"):
        shaped = Transformer(config)
    state = {name: x for name, x in inner.state_dict().items() if name in shaped.state_dict()}
    shaped.load_state_dict(state, assign=True)
    tensors = {renamed(name): x for name, x in tensors_of(family, shaped).items()}
    tensors |= {part.theirs: own[part.ours].contiguous().clone() for part in head.parts()}
    made = family.entries(config) | {"architectures": [head.architecture]}
    labels = {"num_labels": model.labels} if classifies and "id2label" not in entries else {}
    write(Path(directory), family, made, labels | entries, tensors)
    return kind


def head_from_huggingface(source: "Path | str | PreTrainedModel") -> RowClassifier | SpanReader:
    """Open a model with a head for fine-tuning, ours or one of transformers'.

    Args:
        source: as of `from_huggingface`.

    Returns:
        A `RowClassifier` or a `SpanReader`, in evaluation mode.

    Raises:
        ValueError: as `from_huggingface`, and for a model without such a head.
    """
    where, entries, tensors = opened(source)
    kind, said = entries.get("model_type"), (entries.get("architectures") or [""])[0]
    if kind == "fastlm":
        return _own(where, entries, tensors, said)
    tables = (table[kind] for table in (ROWS, SPANS) if kind in table)
    head = next((head for head in tables if head.architecture == said), None)
    if head is None:
        raise ValueError(f"{where} is a {said or kind}, which has no head for rows or spans; try from_huggingface")
    family, own = FAMILIES[kind], {part.theirs: part.ours for part in head.parts()}
    if missing := own.keys() - tensors.keys():
        raise ValueError(f"{where} lacks {min(missing)!r}, which its architecture {said} calls for")
    named = lambda name: name if head.base is None else family.prefix + name.removeprefix(head.base)
    rest = {named(name): x for name, x in tensors.items() if name not in own}
    base = family.architectures.get(("none", 0), "")
    model = transformer(where, entries | {"architectures": [base]}, rest)
    if head.pooling is None:
        made: nn.Module = SpanReader(model)
    else:
        labels = len(tensors[f"{head.out}.weight"])
        end = entries.get("eos_token_id") if head.pooling == "bart" else None
        made = RowClassifier(model, labels, head.pooling, end=end)
    made.load_state_dict({own[name]: tensors[name] for name in own}, strict=False)
    return made.eval()


def _own(where: str, entries: dict, tensors: dict, said: str) -> RowClassifier | SpanReader:
    if said not in ("RowClassifier", "SpanReader"):
        raise ValueError(f"{where} has no head for rows or spans; try from_huggingface")
    model = Transformer(ModelConfig(**entries["fastlm"]))
    head = entries.get("head", {})
    made = SpanReader(model) if said == "SpanReader" else RowClassifier(model, **head)
    made.load_state_dict(tensors)
    return made.eval()


def _head(model: RowClassifier | SpanReader) -> Head | None:
    """The head that transformers has for a model, if it reads rows as ours does."""
    kind = model_type(bare(model.config))
    if isinstance(model, SpanReader):
        return SPANS.get(kind)
    head = ROWS.get(kind)
    return head if head is not None and POOLINGS[head.pooling] == model.pooling else None

"""Models with heads for fine-tuning: theirs as ours, and ours as theirs again, against transformers; and our own format
where transformers has no such model.
"""

import json

import pytest
import torch
from checkpoints import VOCABULARY, Checkpoint, transformers

from fastlm import interop
from fastlm.interop.heads import ROWS, SPANS
from fastlm.models import ModelConfig, Transformer
from fastlm.models.heads import RowClassifier, SpanReader
from fastlm.models.presets import FAMILIES

END, PAD = 2, 0
OPTIONS = dict(pad_token_id=PAD)
OF = {"bart": dict(eos_token_id=END), "xlnet": dict(clamp_len=-1), "deberta-v2": dict(norm_rel_ebd="layer_norm")}


def theirs(architecture: str, kind: str, **options):
    return Checkpoint(architecture, OPTIONS | OF.get(kind, {}) | options).make()


def batch(kind: str):
    """Rows with padding where the family has it, each with one end."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    real = torch.ones_like(tokens)
    if kind == "xlnet":
        real[0, :3] = 0
        tokens[:, -1] = END
    else:
        real[0, 6:] = 0
        tokens[:, -1], tokens[0, 5] = END, END
    return tokens.where(real.bool(), PAD), real


def ours_given(kind: str, tokens, real) -> dict:
    if kind != "bart":
        return dict(attention_mask=real)
    start = torch.full_like(tokens[:, :1], END)  # BART's decoder_start_token_id
    return dict(attention_mask=real, decoder_tokens=torch.cat((start, tokens[:, :-1]), 1))


@pytest.mark.parametrize("labels", [3, 1], ids=["labels", "regression"])
@pytest.mark.parametrize("kind", ROWS)
def test_classifiers_open_here_and_there_again(tmp_path, kind, labels):
    model = theirs(ROWS[kind].architecture, kind, num_labels=labels)
    tokens, real = batch(kind)
    expected = model(tokens, attention_mask=real).logits
    model.save_pretrained(tmp_path / "theirs")
    ours = interop.head_from_huggingface(tmp_path / "theirs")
    assert isinstance(ours, RowClassifier) and ours.labels == labels
    torch.testing.assert_close(ours(tokens, **ours_given(kind, tokens, real)), expected, rtol=1e-4, atol=1e-4)
    names = {i: f"label {i}" for i in range(labels)}
    tokens_of = OPTIONS | OF.get(kind, {}) if kind == "bart" else OPTIONS
    assert interop.head_to_huggingface(ours, tmp_path / "ours", id2label=names, **tokens_of) == kind
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert again.config.id2label == names and type(again) is type(model)
    torch.testing.assert_close(again(tokens, attention_mask=real).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SPANS)
def test_readers_of_spans_open_here_and_there_again(tmp_path, kind):
    model = theirs(SPANS[kind].architecture, kind)
    tokens, real = batch(kind)
    expected = model(tokens, attention_mask=real)
    seen = real.bool()
    model.save_pretrained(tmp_path / "theirs")
    ours = interop.head_from_huggingface(tmp_path / "theirs")
    assert isinstance(ours, SpanReader)
    assert interop.head_to_huggingface(ours, tmp_path / "ours", **OPTIONS) == kind
    again = getattr(transformers, SPANS[kind].architecture).from_pretrained(tmp_path / "ours").eval()
    made, out = ours(tokens, **ours_given(kind, tokens, real)), again(tokens, attention_mask=real)
    for mine, theirs_again, wanted in zip(
        made, (out.start_logits, out.end_logits), (expected.start_logits, expected.end_logits), strict=True
    ):
        torch.testing.assert_close(mine[seen], wanted[seen], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs_again[seen], wanted[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset, pooling", [("transformer-xl", "gpt2"), ("mass", "bart"), ("t5", "bart")])
def test_our_own_format_where_transformers_has_none(tmp_path, preset, pooling):
    config = FAMILIES[preset]
    fields = config.__dict__ | dict(vocab_size=VOCABULARY, dim=32, layers=2, heads=2, context=16, memory=0, head="none")
    model = RowClassifier(Transformer(ModelConfig(**fields)), 3, pooling, end=END if pooling == "bart" else None).eval()
    assert interop.head_to_huggingface(model, tmp_path / "rows", id2label={0: "a", 1: "b", 2: "c"}) == "fastlm"
    again = interop.head_from_huggingface(tmp_path / "rows")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (again.pooling, again.end) == (model.pooling, model.end)
    reader = SpanReader(Transformer(ModelConfig(**fields)))
    assert interop.head_to_huggingface(reader, tmp_path / "spans") == "fastlm"
    assert torch.equal(interop.head_from_huggingface(tmp_path / "spans").out.weight, reader.out.weight)


def test_what_has_no_such_head_is_refused(tmp_path):
    interop.to_huggingface(Transformer(ModelConfig(**FAMILIES["llama"].__dict__ | dict(layers=1))), tmp_path)
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, which has no head for rows or spans"):
        interop.head_from_huggingface(tmp_path)
    interop.to_huggingface(Transformer(ModelConfig(position="t5", layers=1)), tmp_path)
    with pytest.raises(ValueError, match="has no head for rows or spans; try from_huggingface"):
        interop.head_from_huggingface(tmp_path)
    model = theirs("BertForSequenceClassification", "bert", num_labels=2)
    model.save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["ElectraForSequenceClassification"]}))
    with pytest.raises(ValueError, match="is a ElectraForSequenceClassification, which has no head"):
        interop.head_from_huggingface(tmp_path / "bert")

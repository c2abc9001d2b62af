"""Heads to fine-tune with, against transformers' for each family, padding included; a head's own weights are copied by
hand.
"""

import pytest
import torch
import torch.nn.functional as F
from parity import spread

from fastlm import interop
from fastlm.models import Transformer
from fastlm.models.heads import ChoiceReader, RowClassifier, SpanReader, TokenClassifier
from fastlm.models.presets import preset

transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")

_BERT = dict(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
_BART = dict(
    vocab_size=61, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=40, dropout=0.0,
    pad_token_id=0, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
_GPT2 = dict(
    vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=1,
)  # fmt: skip
_DEBERTA = _BERT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
_V3 = _DEBERTA | dict(position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm")
_XLNET = dict(vocab_size=61, d_model=24, n_layer=2, n_head=4, d_inner=40, dropout=0.0, summary_last_dropout=0.0)
# model type → its class's first name, config, the pooling's dense layer and the last one there
KINDS = {
    "bert": ("Bert", _BERT, "bert.pooler.dense", "classifier"),
    "roberta": ("Roberta", _BERT, "classifier.dense", "classifier.out_proj"),
    "electra": ("Electra", _BERT, "classifier.dense", "classifier.out_proj"),
    "deberta": ("Deberta", _DEBERTA, "pooler.dense", "classifier"),
    "deberta-v2": ("DebertaV2", _V3, "pooler.dense", "classifier"),
    "xlnet": ("XLNet", _XLNET, "sequence_summary.summary", "logits_proj"),
    "bart": ("Bart", _BART, "classification_head.dense", "classification_head.out_proj"),
    "gpt2": ("GPT2", _GPT2, None, "score"),
}
POOLING = {"deberta-v2": "deberta"}
SPANS = {"XLNetForQuestionAnswering": "XLNetForQuestionAnsweringSimple"}
L = 11


def make(kind, task, **options):
    """Their model for a task, and a base model of ours with its weights."""
    name, config, *_ = KINDS[kind]
    name = f"{name}For{task}"
    architecture = getattr(transformers, SPANS.get(name, name))
    torch.manual_seed(0)
    theirs = architecture(architecture.config_class(**config | options)).eval()
    spread(theirs)
    return theirs, interop.from_huggingface(theirs.base_model)


def fill(theirs, name, ours):
    ours.load_state_dict(theirs.get_submodule(name).state_dict())


def batch(kind, *shape):
    """Tokens that are no specials, the first the ones that a family reads, and padding: on the right, or where XLNet
    has it.
    """
    tokens = torch.randint(3, 61, (*shape, L))
    tokens[..., L - 1] = 2
    real = torch.ones_like(tokens)
    if kind == "xlnet":
        real[0, ..., :3] = 0
    elif kind == "bart":  # the state of the last of its ends
        tokens[..., 6] = 2
    else:
        real[0, ..., 7:] = 0
    return tokens.where(real.bool(), 0), real


def given(kind, tokens, real):
    """Arguments of ours."""
    if kind != "bart":
        return dict(attention_mask=real)
    shifted = torch.cat((torch.full_like(tokens[..., :1], 2), tokens[..., :-1]), -1)
    return dict(attention_mask=real, decoder_tokens=shifted)


@pytest.mark.parametrize("labels", [3, 1], ids=["labels", "regression"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_as_the_family_does(kind, labels):
    theirs, model = make(kind, "SequenceClassification", num_labels=labels)
    ours = RowClassifier(model, labels, POOLING.get(kind, kind), end=2 if kind == "bart" else None).eval()
    *_, dense, out = KINDS[kind]
    if dense is not None:
        fill(theirs, dense, ours.dense)
    fill(theirs, out, ours.out)
    tokens, real = batch(kind, 3)
    expected = theirs(tokens, attention_mask=real.float() if kind == "xlnet" else real).logits
    logits = ours(tokens, **given(kind, tokens, real))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for made in (logits, expected):
        made.square().sum().backward()
    torch.testing.assert_close(ours.out.weight.grad, theirs.get_submodule(out).weight.grad, rtol=1e-4, atol=1e-4)
    if dense is not None:
        gradient = theirs.get_submodule(dense).weight.grad
        torch.testing.assert_close(ours.dense.weight.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bart"])
def test_tokens_are_labelled(kind):
    theirs, model = make(kind, "TokenClassification", num_labels=5)
    ours = TokenClassifier(model, 5).eval()
    fill(theirs, "classifier", ours.out)
    tokens, real = batch(kind, 2)
    expected = theirs(tokens, attention_mask=real.float() if kind == "xlnet" else real).logits
    seen = real.bool()
    torch.testing.assert_close(ours(tokens, attention_mask=real)[seen], expected[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_marked(kind):
    theirs, model = make(kind, "QuestionAnswering")
    ours = SpanReader(model).eval()
    fill(theirs, "qa_outputs", ours.out)
    tokens, real = batch(kind, 2)
    start, end = torch.tensor([1, 40]), torch.tensor([3, 5])  # the second begins outside
    out = theirs(
        tokens, attention_mask=real.float() if kind == "xlnet" else real, start_positions=start, end_positions=end
    )
    logits = ours(tokens, **given(kind, tokens, real))
    seen = real.bool()
    for mine, yours in zip(logits, (out.start_logits, out.end_logits), strict=True):
        torch.testing.assert_close(mine[seen], yours[seen], rtol=1e-5, atol=1e-5)
    yours = SpanReader.loss((out.start_logits, out.end_logits), start, end)
    torch.testing.assert_close(yours, out.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "electra", "deberta-v2", "xlnet"])
def test_choices_are_weighed(kind):
    theirs, model = make(kind, "MultipleChoice")
    ours = ChoiceReader(model, POOLING.get(kind, kind)).eval()
    dense = {"electra": "sequence_summary.summary"}.get(kind, KINDS[kind][2])
    fill(theirs, dense, ours.dense)
    fill(theirs, "logits_proj" if kind == "xlnet" else "classifier", ours.out)
    tokens, real = batch(kind, 2, 4)
    expected = theirs(tokens, attention_mask=real.float() if kind == "xlnet" else real).logits
    logits = ours(tokens, attention_mask=real)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


class Dropped(torch.nn.Module):
    """In a dense layer's place: how much of what it reads is zero."""

    def forward(self, x):
        self.share = float((x == 0).float().mean())
        return x


def test_dropout_stands_where_the_family_has_it():
    model = Transformer(preset("bert", vocab_size=61, dim=16, layers=1, head="none", pair_labels=0))
    share = {}
    for pooling in ("bert", "roberta"):
        head = RowClassifier(model, 1, pooling, dropout=0.5).train()
        head.dense = Dropped()
        head(torch.randint(61, (64, L)))
        share[pooling] = head.dense.share
    assert share["bert"] == 0 and 0.4 < share["roberta"] < 0.6


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: RowClassifier(m, 2, "berd"), "pooling is 'berd'; choose from 'bert'"),
        (lambda m: RowClassifier(m, 2, "bart"), "give its number as end"),
        (lambda m: RowClassifier(m, 0, "bert"), "labels is 0"),
        (lambda m: RowClassifier(m, 2, "bart", end=7)(torch.zeros(2, L).long()), "row 0 has no token 7, the end"),
        (
            lambda m: RowClassifier(m, 2, "bart", end=7)(torch.zeros(2, L).long(), torch.zeros(2, L + 1).long()),
            rf"decoder_tokens are \[2, {L + 1}\] and tokens \[2, {L}\]",
        ),
        (
            lambda m: RowClassifier(m, 2, "gpt2")(torch.zeros(2, L).long(), attention_mask=torch.zeros(2, L).long()),
            "row 0 is padding throughout",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(call, message):
    model = Transformer(preset("bert", vocab_size=61, dim=16, layers=1))
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_span_outside_counts_for_nothing():
    logits = (torch.randn(2, L), torch.randn(2, L))
    loss = SpanReader.loss(logits, torch.tensor([1, L]), torch.tensor([2, -5]))
    expected = sum(F.cross_entropy(x[:1], torch.tensor([place])) for x, place in zip(logits, (1, 2), strict=True)) / 2
    torch.testing.assert_close(loss, expected)

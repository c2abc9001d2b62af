"""Losses without logits: the loss and every gradient beside those of the model's own, and when logits are made."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import BEFORE_5, VOCABULARY, make, padded, tokens, transformers
from largest import Largest

import fastlm
from fastlm.interop.swap.logits import Logits

MODELS = {
    "causal": "bloom cohere gemma gemma2 gpt2 gpt_neox granite llama mistral mpt olmo2 phi3 qwen2 qwen3 smollm3",
    "masked": "albert bert deberta-v2 electra roberta",
    "seq2seq": "bart mbart t5 umt5",
}
MODELS = [(kind, name) for kind, names in MODELS.items() for name in names.split()]
HOW = "fastlm.linear_cross_entropy: no logits while it trains with labels"


def labelled(**more) -> dict:
    mask = padded("right")
    return dict(input_ids=tokens(), attention_mask=mask, labels=tokens().masked_fill(mask == 0, -100)) | more


def step(model, given) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


WAYS = {
    "mean": {},
    "a sum over all batches": dict(num_items_in_batch=torch.tensor(37)),
    "labels in their places": dict(shift_labels=F.pad(labelled()["labels"][:, 1:], (0, 1), value=-100)),
    "another label to ignore": dict(labels=tokens().masked_fill(padded("right") == 0, 3), ignore_index=3),
}


@pytest.mark.parametrize("kind, name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients(kind, name, way):
    if way != "mean" and kind != "causal":
        pytest.skip("it takes no such argument")
    if BEFORE_5 and name == "bloom" and way in ("labels in their places", "another label to ignore"):
        pytest.skip("before transformers 5 BLOOM takes no such argument")
    model, given = make(kind, name, "eager").train(), labelled(**WAYS[way])
    if kind == "seq2seq":
        model.config.decoder_start_token_id = 1
    want, gradients = step(model, given)
    assert ("", HOW) in fastlm.swap(model).swapped
    got, mine = step(model, given)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    largest = max(x.abs().max().item() for x in gradients.values())
    torch.testing.assert_close(mine, gradients, rtol=1e-3, atol=1e-5 * largest)
    output = model(**given)
    assert output.logits is None and "logits" not in output


def test_logits_are_made_when_they_are_asked_for():
    model = make("causal", "llama", "eager")
    given, state, of_head = labelled(), copy.deepcopy(model.state_dict()), vars(model.lm_head).keys() | set()
    want = model(**given)
    fastlm.swap(model)
    out = model(**given)  # evaluation
    torch.testing.assert_close((out.loss, out.logits), (want.loss, want.logits), rtol=1e-4, atol=1e-4)
    model.train()
    assert model(given["input_ids"]).logits.shape == (2, 12, VOCABULARY)
    loss, logits, *_ = model(**given, return_dict=False)
    assert logits is None and loss.ndim == 0
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert model(**given).logits is not None
    fastlm.unswap(model)
    assert type(model) is transformers.LlamaForCausalLM and type(model.lm_head) is torch.nn.Linear
    assert vars(model.lm_head).keys() == of_head
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_hooks_of_the_head_see_logits():
    model = make("causal", "llama", "eager").train()
    fastlm.swap(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert model(**labelled()).logits is not None and seen == [(2, 12, VOCABULARY)]


def test_no_tensor_of_logits():
    config = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=20000)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).train()
    fastlm.swap(model)
    ids = torch.arange(600)[None]
    with Largest() as largest:
        model(input_ids=ids, labels=ids).loss.backward()
    assert largest.elements < 600 * 20000


def test_a_loss_of_ones_own_gets_the_logits():
    model, seen = make("causal", "gpt2", "eager").train(), []
    want = model(**labelled()).logits
    fastlm.swap(model)

    def own(logits, labels, **_):
        seen.append(logits.softmax(-1) if len(seen) else 2 * logits[..., :3] - logits[..., 0:1])
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, weight=torch.ones(VOCABULARY))

    model.loss_function = own
    for expected in (2 * want[..., :3] - want[..., 0:1], want.softmax(-1)):
        output = model(**labelled())
        output.loss.backward()
        torch.testing.assert_close((output.logits, seen[-1]), (want, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        lambda x: x.float().softmax(-1),
        lambda x: (x / 3).tanh() * 3,
        lambda x: (x + torch.ones(9)).to(torch.float64)[..., :-1, :],
        lambda x: 2 * x[..., :-1, :].contiguous().view(-1, 9).float(),
    ],
    ids=["float", "bound", "bias", "shifted"],
)
def test_logits_that_are_looked_at_are_the_heads_own(asked):
    """To the bit and the dtype, of a head in bf16."""
    head, states = torch.nn.Linear(4, 9, dtype=torch.bfloat16), torch.randn(2, 5, 4).bfloat16()
    got = asked(Logits.of(head, states))
    torch.testing.assert_close(got + 0, asked(head(states)), rtol=0, atol=0)


def test_it_can_be_left():
    report = fastlm.swap(make("causal", "llama", "eager"), attention=False, norms=False, rotary=False, loss=False)
    assert report == fastlm.interop.swap.Report()


@pytest.mark.skipif(BEFORE_5, reason="before transformers 5 masks ask where queries stand, which torch.compile refuses")
def test_torch_compile():
    model = make("causal", "llama", "eager").train()
    want, _ = step(model, labelled())
    fastlm.swap(model)
    _, mine = step(model, labelled())
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    out = compiled(**labelled())
    out.loss.backward()
    assert out.logits is None
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, mine, rtol=1e-4, atol=1e-5)

"""What every objective promises: batches depend on their number alone, sums add up, and losses begin as guessing's."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastlm.models.heads import Factors
from fastlm.models.presets import FAMILIES, preset
from fastlm.objectives import OBJECTIVES, Vocabulary, base, recipe

SIZE, CONTEXT, STOP = 500, 32, 10
IDS = torch.arange(SIZE)
VOCABULARY = Vocabulary(SIZE, begins_word=IDS % 3 > 0, ends_sentence=IDS == STOP, ends_line=IDS < 0)
STREAM = np.random.default_rng(0).integers(5, SIZE, 20_000).astype(np.uint16)
STREAM[::11], STREAM[::97] = STOP, VOCABULARY.eos
# a preset that learns each, in each variant
LEARNERS = [
    "llama", "roberta", "deberta", "bert", "albert", "electra", "deberta-v3", "xlnet", "bart", "mass", "t5-v1.1"
]  # fmt: skip
CASES = {f"{recipe(name)[0]} of {name}": (name, *recipe(name)) for name in LEARNERS} | {
    "prefix": ("llama", "prefix", {}),
    "span-boundary": ("roberta", "span-boundary", {}),
    "multitask-mlm": ("deberta", "multitask-mlm", {}),
    "contrastive": ("roberta", "contrastive", {}),
}


@pytest.fixture(scope="module", params=CASES)
def made(request):
    """An objective and a small model that learns it."""
    name, objective, options = CASES[request.param]
    torch.manual_seed(0)
    o = OBJECTIVES[objective](STREAM, CONTEXT, VOCABULARY, **options)
    sizes = dict(vocab_size=SIZE + o.extra_ids, dim=32, layers=2, heads=2, context=CONTEXT)
    return o, o.model(preset(name, **sizes, **o.shape)).eval()


def test_all_are_here():
    tried = [(objective, options) for _, objective, options in CASES.values()]
    assert {objective for objective, _ in tried} == set(OBJECTIVES) and all(recipe(name) in tried for name in FAMILIES)


def test_a_batch_is_a_function_of_seed_epoch_and_index(made):
    o, _ = made
    whole = o.batch(3, 0, 2 * len(o))
    for first, count in ((0, 7), (len(o) - 2, 5), (len(o) + 11, 1)):
        part = o.batch(3, first, count)
        assert all(torch.equal(part[name], whole[name][first : first + count]) for name in whole)
    again, other = o.batch(3, 0, 7), o.batch(4, 0, 7)
    assert all(torch.equal(again[name], whole[name][:7]) for name in whole)
    assert not torch.equal(other["inputs"], again["inputs"])
    assert not torch.equal(whole["inputs"][: len(o)], whole["inputs"][len(o) :])


def test_fixed_windows_do_not_depend_on_their_batch(made):
    o, _ = made
    whole = o.fixed(np.arange(o.windows))
    assert all(torch.equal(x, whole[name][3:8]) for name, x in o.fixed(np.arange(3, 8)).items())


def test_micro_batches_add_up_to_their_batch(made):
    o, model = made
    batches = [o.batch(0, first, 2) for first in range(0, 8, 2)]
    whole, parts = o.loss(model, o.batch(0, 0, 8)), [o.loss(model, batch) for batch in batches]
    for term in whole.keys() - {"contrastive"}:  # which compares a micro-batch's rows with one another
        torch.testing.assert_close(sum(part[term] for part in parts), whole[term], rtol=2e-6, atol=0)
    counts = o.targets(o.batch(0, 0, 8))
    assert counts == {term: sum(o.targets(batch)[term] for batch in batches) for term in counts}
    assert counts.keys() == whole.keys() and o.weights.keys() <= whole.keys() and o.compared in whole


def test_the_first_loss_is_that_of_guessing(made):
    o, model = made
    batch = o.batch(0, 0, 16)
    terms, counts = o.loss(model, batch), o.targets(batch)
    # T5's first logits have a variance of 1, which costs half a nat
    spread = 0.5 if o.name == "span-corruption" else 0.0
    of_guessing = dict.fromkeys((o.compared, "boundary"), math.log(SIZE + o.extra_ids) + spread)
    for term, value in terms.items():  # the others are of two classes, or of all views but one's own
        guess = of_guessing.get(term, math.log(counts[term] - 1) if term == "contrastive" else math.log(2))
        assert value.item() / counts[term] == pytest.approx(guess, rel=0.02 if term in of_guessing else 0.1), term


def test_an_evaluation_is_the_loss_and_shares(made):
    o, model = made
    batch = o.fixed(np.arange(4))
    terms, shares = o.evaluate(model, batch)
    assert terms.keys() == o.loss(model, batch).keys() and set(shares) == set(o.shares)
    assert all(0 <= many <= of for many, of in shares.values())


def test_a_loss_makes_no_logits(made, monkeypatch):
    """But those that tokens are drawn from, of which nothing is learned."""
    o, model = made
    asked, logits = [], Factors.logits
    monkeypatch.setattr(Factors, "logits", lambda self: asked.append(torch.is_grad_enabled()) or logits(self))
    o.loss(model, o.batch(0, 0, 2))
    assert asked == [False] * (o.name == "replaced-tokens")


def test_losses_and_gradients_are_those_of_logits(made, monkeypatch):
    o, model = made
    batch = o.batch(0, 0, 4)

    def by_logits(hidden, weight, labels, bias, **options):
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, **options)

    def exactly(hidden, weight, labels, bias, **options):
        return by_logits(
            *(x if x is labels or x is None else x.double() for x in (hidden, weight, labels, bias)), **options
        )

    results = []
    for loss in (base.linear_cross_entropy, by_logits, exactly):
        monkeypatch.setattr(base, "linear_cross_entropy", loss)
        terms = o.loss(model, batch)
        results.append([*terms.values(), *torch.autograd.grad(sum(terms.values()), list(model.parameters()))])
    for got, plain, true in zip(*results, strict=True):
        ulp = 4 * torch.finfo(got.dtype).eps * true.abs().max()
        assert (got - true).abs().max() <= 2 * (plain - true).abs().max() + ulp


def test_every_parameter_learns(made):
    o, model = made
    sum(o.loss(model, o.batch(0, 0, 4)).values()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    model.zero_grad()
    assert not idle


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("span-corruption", dict(rate=1.0), "rate is 1.0"),
        ("span-corruption", dict(mean_span=0.5), "mean_span 0.5"),
        ("mlm", dict(rate=2.0), "rate is 2.0; give a share, from 0 to 1"),
        ("mlm", dict(rate=1.0), "leave nothing to see; give a smaller rate"),
        ("mlm", dict(rounds=0), "rounds is 0"),
        ("mlm", dict(mask=0.9, random=0.2), "mask + random is 1.1"),
        ("denoising", dict(rate=1.5), "rate is 1.5"),
        ("denoising", dict(spoil="burn"), "spoil is 'burn'"),
        ("multitask-mlm", dict(left=-1.0), "give numbers ≥ 0"),
        ("multitask-mlm", dict(both=0.0, left=0.0, right=0.0, prefix=0.0), "one of them above"),
        ("contrastive", dict(temperature=0.0), "temperature is 0.0"),
        ("contrastive", dict(crop=0.0), "a crop of 0 of 31 tokens is none"),
        ("permutation", dict(k=0), "k is 0"),
        ("mass", dict(share=1.5), "are no fragment"),
        ("replaced-tokens", dict(rate=3.0), "rate is 3.0"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(name, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        OBJECTIVES[name](STREAM, CONTEXT, VOCABULARY, **options)


def test_rows_and_windows_that_there_are_not(made):
    o, _ = made
    for numbers in (np.array([-1]), np.array([0, o.windows])):
        with pytest.raises(ValueError, match="which are counted from 0"):
            o.fixed(numbers)
    for context in (0, -3):
        with pytest.raises(ValueError, match=f"context is {context}; give a whole number of at least 1"):
            type(o)(STREAM, context, VOCABULARY)

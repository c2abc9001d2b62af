"""XLNet against transformers' XLNetLMHeadModel: both streams over two segments with memory, and without an order."""

import pytest
import torch
import torch.nn.functional as F
from parity import gradients_agree, spread

from fastlm import interop
from fastlm.interop.families import FAMILIES
from fastlm.models import Transformer
from fastlm.models.presets import preset

transformers = pytest.importorskip("transformers", reason="pip install '.[test]'")

SIZES = dict(vocab_size=61, d_model=24, n_layer=3, n_head=4, d_inner=40, dropout=0.0)
CASES = {
    "memory of 8": dict(mem_len=8),
    "reuse, clamp": dict(mem_len=20, reuse_len=7, clamp_len=5),
    "untied, relu": dict(mem_len=9, tie_word_embeddings=False, ff_activation="relu", layer_norm_eps=1e-5),
    "heads of 3, one layer": dict(mem_len=30, n_head=8, n_layer=1, ff_activation="gelu_new"),
}
L = 13


def both(options):
    torch.manual_seed(0)
    theirs = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**SIZES | options)).eval()
    spread(theirs)
    ours = interop.from_huggingface(theirs)
    return theirs, ours, list(FAMILIES["xlnet"].parts(ours.config))


def drawn_order():
    """Five tokens of each row to predict, in an order; the others are given."""
    predicted = torch.stack([torch.randperm(L)[:5] for _ in range(2)])
    ranks = torch.full((2, L), -1).scatter(1, predicted, torch.stack([torch.randperm(5) for _ in range(2)]))
    is_predicted = torch.zeros(2, L, dtype=torch.long).scatter(1, predicted, 1)
    perm_mask = (ranks[:, None, :] > ranks[:, :, None] - is_predicted[:, :, None]).float()
    return ranks, predicted, perm_mask, F.one_hot(predicted, L).float()


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_two_segments_in_drawn_orders_are_transformers(options, padding):
    theirs, ours, parts = both(options)
    recurrence, mems = ours.new_recurrence(), None
    for _ in range(2):
        ranks, predicted, perm_mask, mapping = drawn_order()
        tokens, types, targets = torch.randint(61, (2, L)), torch.randint(3, (2, L)), torch.randint(61, (2, 5))
        real = torch.ones(2, L, dtype=torch.long)
        if padding != "none":
            real[0, slice(9, None) if padding == "right" else slice(0, 4)] = 0
        expected = theirs(
            tokens, real.float(), mems, perm_mask, mapping, types, use_mems=True,
        )  # fmt: skip
        before = torch.ones(2, len(recurrence), dtype=torch.long)
        logits = ours(
            tokens, attention_mask=torch.cat((before, real), 1), token_types=types, recurrence=recurrence,
            ranks=ranks, predicted=predicted,
        )  # fmt: skip
        mems = expected.mems
        seen = real.gather(1, predicted).bool()
        torch.testing.assert_close(logits[seen], expected.logits[seen], rtol=1e-5, atol=1e-5)
        kept = torch.cat((before, real[:, : options.get("reuse_len", L)]), 1)[:, -len(recurrence) :].bool()
        if padding == "none":
            for mine, yours in zip(recurrence.states, mems, strict=True):
                torch.testing.assert_close(mine[kept], yours.transpose(0, 1)[kept], rtol=1e-5, atol=1e-5)
        else:  # what padding left in memory is nobody's concern, and differs
            recurrence.states = [x.transpose(0, 1).contiguous() for x in mems]
        for made in (expected.logits, logits):
            F.cross_entropy(made[seen], targets[seen]).backward()
    gradients_agree(theirs, ours, parts)


@pytest.mark.parametrize("memory", [False, True], ids=["alone", "memory"])
@pytest.mark.parametrize("types", [False, True], ids=["untyped", "types"])
@pytest.mark.parametrize("options", list(CASES.values())[:2], ids=list(CASES)[:2])
def test_fine_tuning_sees_all(options, types, memory):
    theirs, ours, parts = both(options)
    recurrence, mems = ours.new_recurrence() if memory else None, None
    for _ in range(2):
        tokens, targets = torch.randint(61, (2, L)), torch.randint(61, (2, L))
        given = torch.randint(2, (2, L)) if types else None
        expected = theirs(tokens, mems=mems, token_type_ids=given, use_mems=memory)
        logits = ours(tokens, token_types=given, recurrence=recurrence)
        mems = expected.mems
        torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
        for made in (expected.logits, logits):
            F.cross_entropy(made.flatten(0, 1), targets.flatten()).backward()
    gradients_agree(theirs, ours, parts)


def test_parameters_are_counted_as_transformers_counts_them():
    with torch.device("meta"):
        for name, config in {
            "xlnet-base": dict(d_model=768, n_layer=12, n_head=12, d_inner=3072), "xlnet-large": {},
        }.items():  # fmt: skip
            theirs = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**config))
            assert Transformer(preset(name)).parameter_count() == sum(p.numel() for p in theirs.parameters())


def test_a_query_does_not_see_its_own_token_nor_later_ones():
    torch.manual_seed(0)
    model = Transformer(preset("xlnet", vocab_size=61, dim=24, layers=2)).eval()
    tokens, ranks = torch.randint(61, (1, L)), torch.randperm(L)[None]
    predicted = torch.arange(L)[None]
    logits = model(tokens, ranks=ranks, predicted=predicted)
    for place in range(L):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % 61
        same = (model(changed, ranks=ranks, predicted=predicted) == logits).all(-1)[0]
        assert torch.equal(same, ranks[0] <= ranks[0, place])


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(predicted=torch.tensor([[1, 2]])), "predicted tokens need ranks"),
        (dict(ranks=torch.arange(L)[None], predicted=torch.tensor([[1, 1]])), "names a token of a row twice"),
    ],
)
def test_what_cannot_be_predicted_is_refused(given, message):
    model = Transformer(preset("xlnet", vocab_size=61, dim=24, layers=1))
    with pytest.raises(ValueError, match=message):
        model(torch.randint(61, (1, L)), **given)

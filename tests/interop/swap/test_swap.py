"""The call itself: what it finds, says and leaves alone; and what swapped models refuse or serve at run time."""

import functools
import sys

import pytest
import torch
from checkpoints import B, Checkpoint, L, batches, transformers
from families import BEFORE_5, make, padded, tokens
from torch import nn

import fastlm
from fastlm.interop.swap import xlnet
from fastlm.interop.swap.served import Served


def served(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Served)]


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def test_the_report():
    report = fastlm.swap(make("seq2seq", "t5", "eager"))
    assert ("decoder.final_layer_norm", "fastlm's RMS norm, a pass each way") in report.swapped
    how = "fastlm.attention with T5's bias as a table over distance"
    assert ("encoder.block.0.layer.0.SelfAttention", how) in report.swapped and report.kept == []
    words = str(report)
    assert words.startswith("fastlm.swap: 21 modules swapped, 0 kept\n")
    assert f"encoder.block.1.layer.0.SelfAttention and 4 more: {how}" in words


@pytest.mark.parametrize("kind, name", [("causal", "llama"), ("causal", "gpt2"), ("causal", "mistral")])
def test_models_of_the_attention_interface(kind, name):
    model = make(kind, name, "sdpa")
    want = model(tokens(), attention_mask=padded("left")).logits
    report = fastlm.swap(model, norms=False, rotary=False, loss=False)
    assert report.swapped == [("", "attn_implementation='fastlm'")] and served(model) == []
    assert model.config._attn_implementation == "fastlm"
    got = model(tokens(), attention_mask=padded("left")).logits
    real = padded("left").bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)
    assert fastlm.swap(model, norms=False, rotary=False, loss=False).swapped == report.swapped  # twice is once
    fastlm.unswap(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens(), attention_mask=padded("left")).logits, want)


def test_scores_that_are_bounded():
    model, real = make("causal", "gemma2", "eager"), padded("left").bool()
    parameters = list(model.parameters())

    def made() -> tuple[torch.Tensor, ...]:
        logits = model(tokens(), attention_mask=padded("left"), use_cache=False).logits[real]
        return logits.detach(), *torch.autograd.grad(logits.square().mean(), parameters)

    want, report = made(), fastlm.swap(model, loss=False)
    assert ("", "attn_implementation='fastlm'") in report.swapped and report.kept == []
    for mine, theirs in zip(made(), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    fastlm.unswap(model)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(made(), want, strict=True))


def test_a_part_of_another_model():
    """A BLOOM that reads pictures is swapped, and so is what sees them; what is around both has no name for it."""
    text, vision = (
        make("causal", "bloom", "eager"),
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
    )
    both = nn.ModuleDict({"text": text, "vision": transformers.CLIPVisionModel(vision)})
    report = fastlm.swap(both, loss=False)
    assert "text.transformer" in served(both) and both["text"].transformer.h[0].self_attention.how
    if not BEFORE_5:
        assert ("vision", "attn_implementation='fastlm'") in report.swapped
    assert all(torch.isfinite(both["text"](tokens()).logits).flatten())


def test_what_is_not_known_is_told_by_name():
    class MyAttention(nn.Module):
        pass

    model = nn.ModuleDict({"mine": MyAttention(), "other": nn.Linear(1, 1)})
    assert fastlm.swap(model).kept == [("mine", "fastlm does not know MyAttention")]
    if not BEFORE_5:
        report = fastlm.swap(make("base", "longformer", "eager"))
        assert report.swapped == [] and "computes attention itself" in report.kept[0][1]
    with pytest.raises(ValueError, match=r"model is a str; give a torch.nn.Module"):
        fastlm.swap("t5-small")


def test_one_who_extends_a_known_class_is_left_alone():
    model = make("causal", "bloom", "eager")
    known = type(model.transformer.h[0].self_attention)
    mine = type("MyBloomAttention", (known,), {})
    model.transformer.h[0].self_attention.__class__ = mine
    before = model(tokens()).logits
    report = fastlm.swap(model, loss=False)
    words = "MyBloomAttention extends BloomAttention, and may compute something else"
    assert ("transformer.h.0.self_attention", words) in report.kept and report.swapped == []
    assert served(model) == [] and torch.equal(model(tokens()).logits, before)
    stack = make("causal", "mpt", "eager").transformer
    stack.__class__ = type("MyMptModel", (type(stack),), {})
    assert ("", "MyMptModel extends MptModel, and may compute something else") in fastlm.swap(stack).kept


def test_options_that_are_not_served():
    """All of a stack is swapped, or nothing."""
    model = Checkpoint("DebertaForMaskedLM", dict(talking_head=True)).make()
    report = fastlm.swap(model, loss=False)
    assert report.swapped == [] and served(model) == []
    assert ("deberta.encoder.layer.0.attention.self", "talking_head is asked for") in report.kept
    other = "deberta.encoder.layer.0.attention.self cannot be: talking_head is asked for"
    assert ("deberta.encoder", other) in report.kept
    for architecture, options, why in (
        ("BloomForCausalLM", dict(pretraining_tp=2, slow_but_exact=True), "slow_but_exact is asked for"),
        ("XLNetLMHeadModel", dict(bi_data=True), "bi_data is asked for"),
        ("DebertaV2ForMaskedLM", dict(position_buckets=20, max_relative_positions=11), "position_buckets is 20 and"),
    ):
        report = fastlm.swap(Checkpoint(architecture, options).make(), loss=False)
        assert report.swapped == [] and any(why in words for _, words in report.kept)


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 has no relative positions in BERT")
def test_bert_that_is_not_served():
    for options, why in (({}, "its positions are absolute"), (dict(is_decoder=True), "it decodes")):
        options = {"position_embedding_type": "relative_key"} | options if options else options
        report = fastlm.swap(Checkpoint("BertModel", options).make())
        assert report.swapped == [] and all(why in words for _, words in report.kept)


def test_without_transformers():
    import subprocess

    code = """
import sys; sys.modules["transformers"] = None
import torch, fastlm
report = fastlm.swap(torch.nn.Sequential(torch.nn.Linear(2, 2)))
print(report)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fastlm.swap: 0 modules swapped, 0 kept", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Wrappers


def test_wrappers_of_others():
    hooks = pytest.importorskip("accelerate", reason="pip install '.[test]'").hooks
    hook = functools.partial(hooks.AlignDevicesHook, execution_device="cpu", io_same_device=True)
    model = make("seq2seq", "t5", "eager")
    given = dict(input_ids=tokens(), decoder_input_ids=tokens(), attention_mask=padded("left"))
    before = model(**given).logits
    inner = model.encoder.block[0].layer[0].SelfAttention
    hooks.add_hook_to_module(inner, hook())
    report = fastlm.swap(model, norms=False, rotary=False, loss=False)
    why = "its forward was wrapped, as by accelerate; swap first"
    assert ("encoder.block.0.layer.0.SelfAttention", why) in report.kept
    assert all(name.startswith("decoder") for name in served(model))
    torch.testing.assert_close(model(**given).logits, before, rtol=1e-4, atol=1e-4)
    hooks.remove_hook_from_module(inner)
    fastlm.swap(model, loss=False)
    assert "encoder" in served(model)
    hooks.add_hook_to_module(model, hook(), append=True)
    for module in list(model.modules())[1:]:
        hooks.add_hook_to_module(module, hook())
    torch.testing.assert_close(model(**given).logits, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"encoder was wrapped after fastlm.swap; take the wrapper off first"):
        fastlm.unswap(model)
    hooks.remove_hook_from_submodules(model)
    fastlm.unswap(model)
    assert torch.equal(model(**given).logits, before)


def test_optimizers_and_lora():
    """An optimizer that was made before goes on, and what is put in place of a linear layer is called."""
    model = make("seq2seq", "t5", "eager").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastlm.swap(model)
    inner = model.encoder.block[0].layer[0].SelfAttention

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.more(x)

    inner.q = Adapted(inner.q)
    before = inner.k.weight.clone()
    model(input_ids=tokens(), decoder_input_ids=tokens()).logits.square().mean().backward()
    optimizer.step()
    assert inner.q.more.weight.grad.abs().sum() > 0 and not torch.equal(inner.k.weight, before)


# ---------------------------------------------------------------------------------------------------------------------
# At run time

REFUSED = "was swapped by fastlm and does not {}; fastlm.unswap\\(model\\) brings back its own forward, which does"


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "UMT5Model", "BloomForCausalLM",
                                          "MptForCausalLM", "DebertaForMaskedLM", "DebertaV2ForMaskedLM",
                                          "XLNetLMHeadModel"])  # fmt: skip
def test_attentions_are_refused(architecture):
    model = Checkpoint(architecture, {}).make()
    fastlm.swap(model)
    with pytest.raises(NotImplementedError, match=REFUSED.format("serve output_attentions")):
        model(**batches(model)["none"].given, output_attentions=True)
    model(**batches(model)["none"].given, output_hidden_states=True)


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 has no head_mask")
def test_head_masks_are_refused():
    for architecture in ("BloomModel", "XLNetModel"):
        model = Checkpoint(architecture, {}).make()
        fastlm.swap(model)
        with pytest.raises(NotImplementedError, match=REFUSED.format("serve head_mask")):
            model(**batches(model)["none"].given, head_mask=torch.ones(2, 4))


def test_masks_of_each_pair_are_served_as_they_are():
    """Which the caller has made; T5's decoder and DeBERTa take them."""
    drawn = torch.rand(B, L, L, generator=torch.Generator().manual_seed(0)) < 0.6
    pairs = drawn | torch.eye(L, dtype=torch.bool)
    for architecture, given in (
        ("T5EncoderModel", {"attention_mask": torch.where(pairs, 0.0, torch.finfo(torch.float32).min)[:, None]}),
        ("MptForCausalLM", {"attention_mask": ~pairs[:, None]}),
    ):
        model = Checkpoint(architecture, {}).make()
        given = batches(model)["none"].given | given
        try:
            want = model(**given)[0]
        except (ValueError, RuntimeError, IndexError):
            assert BEFORE_5
            continue
        fastlm.swap(model)
        torch.testing.assert_close(model(**given)[0], want, rtol=1e-4, atol=1e-4)
    for architecture in ("DebertaModel", "DebertaV2Model"):
        encoder = Checkpoint(architecture, {}).make().encoder
        x = torch.randn(B, L, 24, generator=torch.Generator().manual_seed(0))
        want = encoder(x, pairs.long())[0]
        fastlm.swap(encoder)
        torch.testing.assert_close(encoder(x, pairs.long())[0], want, rtol=1e-4, atol=1e-4)


def test_what_layers_share_is_not_taken_from_others():
    model = Checkpoint("T5EncoderModel", {}).make()
    fastlm.swap(model)
    inner, x = model.encoder.block[0].layer[0].SelfAttention, torch.randn(1, 3, 24)
    with pytest.raises(NotImplementedError, match=REFUSED.format("take a position_bias of each pair")):
        inner(x, position_bias=torch.zeros(1, 4, 3, 3))
    model = Checkpoint("DebertaV2ForMaskedLM", {}).make()
    fastlm.swap(model)
    inner = model.deberta.encoder.layer[0].attention.self
    with pytest.raises(NotImplementedError, match=REFUSED.format("take relative_pos of each pair")):
        inner(x, torch.ones(1, 3), relative_pos=torch.zeros(3, 3), rel_embeddings=torch.zeros(4, 24))


XLNET = {
    "two streams": {},
    "memory": dict(mem_len=8),
    "memory and its part": dict(mem_len=8, reuse_len=5),
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("options", XLNET.values(), ids=XLNET)
def test_two_streams_memory_and_segments(options, padding):
    """XLNet's own arguments: an order of guessing, the places of what is guessed, segments, and states remembered."""
    model = Checkpoint("XLNetLMHeadModel", options).make()
    draw = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(L, generator=draw) for _ in range(B)])
    given = dict(
        input_ids=torch.randint(4, 61, (B, L), generator=draw), perm_mask=(order[:, :, None] <= order[:, None]).float(),
        target_mapping=torch.nn.functional.one_hot(torch.tensor([[3, 7, 1], [0, 5, 10]]), L).float(),
        token_type_ids=torch.arange(L).expand(B, L) // 4, use_mems=True, output_hidden_states=True,
    )  # fmt: skip
    given |= {"attention_mask": torch.tensor([[1] * L, [1] * 8 + [0] * (L - 8)])} if padding else {}

    def made() -> list:
        first = model(**given)
        again = model(**given | dict(mems=first.mems))
        return [first.logits, again.logits, *first.mems, *again.mems, *again.hidden_states[::2]]

    # Who is guessed first sees nothing: transformers then weighs all keys alike, and fastlm gives zeros.
    real = given.get("attention_mask", torch.ones(B, L))
    sees = ((given["perm_mask"] == 0) & (real[:, None] == 1)).any(-1)
    given["target_mapping"] = given["target_mapping"].masked_fill(~sees[:, None], 0)
    want = made()
    fastlm.swap(model)
    for mine, theirs in zip(made(), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_an_order_of_guessing_is_recognised(seed):
    """Ties, memory, queries that see nothing and keys that nobody sees among them; and what is none stays as it is."""
    draw = torch.Generator().manual_seed(seed)
    of_queries, of_keys = (torch.randint(seed % 9 + 1, (2, n), generator=draw) for n in (7, 9))
    visible = of_keys[:, None] <= of_queries[..., None] - seed % 3
    given = xlnet.pairs(visible)
    assert given.keys() == {"order"}
    values = torch.eye(9).expand(2, 1, -1, -1)
    flat = torch.zeros(2, 1, 9, 9)
    for hidden in (visible, torch.rand(2, 7, 9, generator=draw) < 0.5):
        given = xlnet.pairs(hidden)
        assert torch.equal(fastlm.attention(flat[:, :, :7], flat, values, **given)[:, 0] > 0, hidden)
    assert given.keys() == {"bias"}


def test_states_and_tuples_of_xlnet():
    model = Checkpoint("XLNetModel", dict(mem_len=4)).make()
    ids = batches(model)["none"].given["input_ids"]
    embedded = model.word_embedding(ids)
    calls = [
        dict(input_ids=ids, output_hidden_states=True, return_dict=False),
        dict(inputs_embeds=embedded, use_mems=False, return_dict=False),
        dict(input_ids=ids, input_mask=torch.zeros(B, L)),
    ]
    want = [model(**call) for call in calls]
    fastlm.swap(model)
    for call, theirs in zip(calls, want, strict=True):
        got = model(**call)
        assert type(got) is type(theirs) and len(got) == len(theirs)
        values = lambda output: output if isinstance(output, tuple) else output.to_tuple()
        torch.testing.assert_close(values(got), values(theirs), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embedded)

"""Every family that swap knows, on small configs with options of every kind: outputs, losses and gradients beside those
of its own forward, caches, memory, and everything as it was after unswap.
"""

import copy
import functools
import pickle

import pytest
import torch
import torch.utils.checkpoint
from checkpoints import CHECKPOINTS, VOCABULARY, Checkpoint, batches, family_of, identity, theirs
from families import BEFORE_5
from largest import Largest

import fastlm
from fastlm.backends.dispatch import record_choices

FAMILIES = ("t5", "mt5", "umt5", "bloom", "mpt", "deberta", "deberta-v2", "xlnet")
OTHERS = [
    Checkpoint("BloomForCausalLM", dict(apply_residual_connection_post_layernorm=True, pretraining_tp=2)),
    Checkpoint("MptForCausalLM", dict(attn_config={"clip_qkv": 0.5})),
    Checkpoint("XLNetLMHeadModel", dict(attn_type="uni")),
    Checkpoint("XLNetLMHeadModel", dict(attn_type="uni", same_length=True, clamp_len=3)),
    Checkpoint("T5ForQuestionAnswering", {}),
    Checkpoint("DebertaV2ForTokenClassification", dict(position_buckets=4, max_relative_positions=9)),
]
if BEFORE_5:
    OTHERS += [
        Checkpoint("BertForMaskedLM", dict(position_embedding_type="relative_key")),
        Checkpoint("BertForPreTraining", dict(position_embedding_type="relative_key_query")),
        Checkpoint("ElectraForMaskedLM", dict(position_embedding_type="relative_key_query", num_attention_heads=2)),
        Checkpoint("RobertaModel", dict(position_embedding_type="relative_key", num_hidden_layers=1)),
    ]
SWAPPED = [c for c in CHECKPOINTS if family_of(c) in FAMILIES] + OTHERS
each = pytest.mark.parametrize("checkpoint", SWAPPED, ids=identity)
OWN_LENGTHS = ("t5", "mt5", "umt5", "bloom", "mpt", "xlnet")  # what they learn of positions has no end
FIRST = {family_of(c): c for c in reversed(SWAPPED)}  # of each family
one_each = pytest.mark.parametrize("checkpoint", [c for c in SWAPPED if c in FIRST.values()], ids=identity)


def run(model, batch) -> dict[str, torch.Tensor]:
    """Outputs and every gradient of their sum, weighted."""
    model.zero_grad()
    outputs = [x for x in theirs(model, batch) if x is not None]
    sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs).backward()
    made = {str(i): x.detach() for i, x in enumerate(outputs)}
    return made | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def swapped(model) -> torch.nn.Module:
    report = fastlm.swap(model, loss=False)
    assert report.swapped and not report.kept, report
    return model


def compare(plain: dict, got: dict, truth: dict) -> None:
    """The rule of tests/support/tolerance.py, where plain PyTorch is the model's own forward: twice its error for
    outputs, and three times for gradients, which are long reductions.
    """
    assert got.keys() == plain.keys() == truth.keys()
    scale = max(x.abs().max() for x in truth.values())
    for name, x in truth.items():
        error, of_plain = ((made[name].double() - x).abs() for made in (got, plain))
        # a row that sees one key has no gradient of scores; softmax itself cancels exactly there, fused kernels round
        probe = 32 * torch.finfo(torch.float32).eps * max(x.abs().max(), 1e-2 * scale)  # some are zero but for rounding
        factor = 2 if name.isdigit() else 3
        assert of_plain.max() <= 1e-3 * scale, f"{name}: transformers' own forward is {of_plain.max():.1e} off"
        assert error.max() <= factor * of_plain.max() + probe, f"{name}: {error.max():.1e}, {of_plain.max():.1e}"


def exact(checkpoint: Checkpoint) -> torch.nn.Module:
    """In fp64; swapped where transformers' softmax is in fp32, in which fp64's least number is -inf."""
    model = checkpoint.make().double()
    in_fp32 = ("bloom", "mpt", "t5", "mt5", "umt5") if BEFORE_5 else ("bloom", "mpt")
    return swapped(model) if family_of(checkpoint) in in_fp32 else model


def batches_of(model) -> dict:
    """transformers' XLNet takes no masks for one direction."""
    only = ["none"] if getattr(model.config, "attn_type", "bi") == "uni" else None
    return {name: batch for name, batch in batches(model).items() if only is None or name in only}


@each
def test_outputs_and_gradients(checkpoint: Checkpoint):
    model, truth = checkpoint.make(), exact(checkpoint)
    plain = {name: run(model, batch) for name, batch in batches_of(model).items()}
    swapped(model)
    for name, batch in batches_of(model).items():
        with fastlm.use_backend("reference"):  # for what of it is swapped
            want = run(truth, batch)
        compare(plain[name], run(model, batch), want)


@one_each
def test_everything_is_as_it_was(checkpoint: Checkpoint, tmp_path):
    """Parameters, state dict and files while it is swapped; and every bit after."""
    model = checkpoint.make()
    batch = batches(model)["left"]
    before, state = theirs(model, batch), {name: x.clone() for name, x in model.state_dict().items()}
    parameters, classes = dict(model.named_parameters()), [type(module) for module in model.modules()]
    config = model.config.to_dict()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    swapped(model)
    assert list(model.state_dict()) == list(state) and model.config.to_dict() == config
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [type(module).__name__ for module in model.modules()] == [kind.__name__ for kind in classes]
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, fastlm.interop.swap.served.Served) for module in again.modules())
    got = theirs(model, batch)
    assert any("Attention" in name for name in calls)
    for module in model.modules():
        module._forward_hooks.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(*pair) for pair in zip(theirs(other, batch), got, strict=True))
        fastlm.unswap(other)
        assert all(torch.equal(*pair) for pair in zip(theirs(other, batch), before, strict=True))
    fastlm.unswap(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(theirs(model, batch), before, strict=True))


@one_each
def test_nothing_is_l_by_l(checkpoint: Checkpoint):
    """Forward and backward at L = 2048 make no tensor of L·L elements, and attention is computed by a fused kernel."""
    L = 2048
    lengths = {"mpt": dict(max_seq_len=L), "t5": dict(num_layers=1), "umt5": dict(num_layers=1)}
    changes = lengths.get(family_of(checkpoint), {})
    changes |= {"max_position_embeddings": L + 8} if family_of(checkpoint) not in OWN_LENGTHS else {}
    model = swapped(checkpoint._replace(options=checkpoint.options | changes).make().train())
    ids = torch.randint(4, VOCABULARY, (2, L), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": (torch.arange(L) < torch.tensor([[L], [L - 300]])).long()}
    given |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"token_type_ids": ids % 2}
    given = {name: x for name, x in given.items() if name != "token_type_ids" or family_of(checkpoint) == "xlnet"}
    with Largest() as largest, record_choices() as chosen:
        model(**given)[0].float().square().sum().backward()
    assert largest.elements < L * L
    assert chosen["attention"] in ("cpp", "sdpa"), chosen


WRITERS = [c for c in SWAPPED if c.architecture.endswith(("ForConditionalGeneration", "ForCausalLM", "LMHeadModel"))]


@pytest.mark.parametrize("checkpoint", WRITERS, ids=identity)
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generate(checkpoint: Checkpoint, cache):
    """The same tokens after prompts of several lengths, and after four beams."""
    model = checkpoint.make()
    batch = batches(model)["left"].given
    given = {name: x for name, x in batch.items() if not name.startswith("decoder")}
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=True)
    options |= {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    if family_of(checkpoint) == "xlnet":
        if cache == "static":
            pytest.skip("it remembers states, and has no cache")
        options.pop("cache_implementation", None)
    ways = (dict(), dict(num_beams=4))
    write = lambda: [model.generate(**given, **options, **way) for way in ways]
    try:
        want = write()
    except (ValueError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        pytest.skip(f"transformers itself: {error}")
    swapped(model)
    assert all(torch.equal(*pair) for pair in zip(write(), want, strict=True))


@one_each
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpoints_and_dropout(checkpoint: Checkpoint, reentrant):
    """The same dropout when it is computed again, and another one the next time."""
    model = swapped(checkpoint.make()).train()
    batch = batches(model)["left"]
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has no checkpoints in this model")

    def gradients(seed: int) -> dict:
        torch.manual_seed(seed)
        return run(model, batch)

    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    want, other = gradients(0), gradients(1)
    model._set_gradient_checkpointing(True, checkpointed)
    if reentrant:
        model.enable_input_require_grads()
        if "deberta" in family_of(checkpoint):
            pytest.skip("transformers' own passes through its table twice")
    got = gradients(0)
    largest = max(x.abs().max().item() for x in want.values())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * largest)
    differ = [name for name in want if not torch.allclose(want[name], other[name], rtol=1e-3)]
    assert bool(differ) == any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


@one_each
def test_autocast(checkpoint: Checkpoint):
    """In bf16, as near to fp64 as the model's own forward is, within the rule's factor of two: over weights that differ
    a little, the ratio of these small models' errors is anything from 0.6 to 1.9.
    """
    model = checkpoint.make()
    batch = batches(model)["right"]
    with fastlm.use_backend("reference"):  # for what of it is swapped
        truth, bound = run(exact(checkpoint), batch), 0.05

    def far(model) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            made = run(model, batch)
        return (squares(made[name].double() - x for name, x in truth.items()) / squares(truth.values())) ** 0.5

    if family_of(checkpoint) != "deberta":  # whose own overflows there
        bound = 2 * far(model)
    assert far(swapped(model)) <= bound


def squares(tensors) -> float:
    return sum(x.square().sum().item() for x in tensors)


# mT5's modules are served as T5's; and of these one layer each way has all that there is to trace, but for T5's table,
# which the layers share
TRACED = {"t5": dict(num_layers=1), "umt5": dict(num_layers=1, num_decoder_layers=1)}


@pytest.mark.parametrize("checkpoint", [c for name, c in FIRST.items() if name != "mt5"], ids=identity)
@pytest.mark.skipif(BEFORE_5, reason="before transformers 5 masks ask where queries stand, which torch.compile refuses")
def test_torch_compile(checkpoint: Checkpoint):
    """Without a gradient, and with one where there is padding."""
    options = checkpoint.options | TRACED.get(family_of(checkpoint), {})
    model = swapped(checkpoint._replace(options=options).make())
    compiled = torch.compile(model, backend="aot_eager")
    for side in ("none", "right"):
        batch = batches(model)[side]
        with torch.set_grad_enabled(side == "right"):
            for want, got in zip(theirs(model, batch), theirs(compiled, batch), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

"""Each family of transformers as ours, on small configs with options of every kind: outputs, gradients, and the way
there and back.
"""

import json
import warnings

import pytest
import torch
from checkpoints import CHECKPOINTS, Checkpoint, batches, identity, ours, theirs, transformers

from fastlm import interop
from fastlm.interop.families import FAMILIES
from fastlm.interop.family import resolved

AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "Model": "AutoModel",
}
each = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=identity)


def opened(source):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastlm does not know")
        return interop.from_huggingface(source)


def auto(architecture: str) -> type:
    if architecture.endswith("EncoderModel"):
        return getattr(transformers, architecture)
    return getattr(transformers, next(name for end, name in AUTO.items() if architecture.endswith(end)))


@each
def test_outputs_and_gradients_are_theirs(checkpoint: Checkpoint):
    model = checkpoint.make()
    mine = opened(model)
    assert not mine.training
    for name, batch in batches(model).items():
        outputs = theirs(model, batch), ours(mine, batch)
        for want, got in zip(*outputs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for tensors in outputs:
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in tensors).backward()
    gradients = {name: p.grad for name, p in mine.named_parameters(remove_duplicate=False)}
    family = FAMILIES[model.config.model_type]
    named = dict(model.named_parameters(remove_duplicate=False))
    largest = max(g.abs().max() for g in gradients.values() if g is not None)
    for part in family.parts(mine.config):
        p = named.get(part.theirs, named.get(part.theirs.removeprefix(family.prefix)))
        if p is None or p.grad is None:  # a constant of theirs, or idle, as a query stream that predicts nothing
            assert part.ours in ("head.bias", "encoder.queries.start")
            continue
        error, scale = (part.of(gradients[part.ours]) - p.grad).abs().max(), p.grad.abs().max()
        assert error <= 1e-4 * max(scale, 0.01 * largest), part


@each
@torch.no_grad()
def test_there_and_back(checkpoint: Checkpoint, tmp_path):
    """Theirs, saved, as ours, saved, as theirs and as ours: the same outputs, and the same bits of ours."""
    model = checkpoint.make()
    model.save_pretrained(tmp_path / "theirs")
    mine = opened(tmp_path / "theirs")
    tokens = {name: value for name, value in model.config.to_dict().items() if name == "pad_token_id"}
    kind = interop.to_huggingface(mine, tmp_path / "ours", **tokens)
    assert kind != "fastlm"
    architecture = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    again, report = auto(architecture).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert type(again).__name__ == architecture
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = batches(model)["left"]
    for want, got in zip(theirs(model, batch), theirs(again.eval(), batch), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    back = opened(tmp_path / "ours")
    assert resolved(back.config) == resolved(mine.config)
    assert all(torch.equal(x, mine.state_dict()[name]) for name, x in back.state_dict().items())


def test_every_family_has_four():
    each = [getattr(transformers, checkpoint.architecture).config_class.model_type for checkpoint in CHECKPOINTS]
    assert all(each.count(name) >= 4 for name in FAMILIES if name != "fastlm")

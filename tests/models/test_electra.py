"""ELECTRA's two models: their shapes are the papers', and what they share is one."""

import copy

import pytest
import torch

from fastlm.models import Electra, Transformer
from fastlm.models.electra import generator_config
from fastlm.models.presets import PRESETS, preset
from fastlm.objectives import recipe

TINY = dict(vocab_size=50, dim=16, layers=2, heads=2, context=12)


@pytest.mark.parametrize("name", [name for name in PRESETS if f"{name}-generator" in PRESETS])
def test_a_generators_shape_is_that_of_its_own_preset(name):
    options = recipe(name)[1].get("generator", {})
    assert generator_config(PRESETS[name], **options) == PRESETS[f"{name}-generator"]


def electra(sharing="shared", name="electra", **generator) -> Electra:
    torch.manual_seed(0)
    shape = preset(name, **TINY)
    return Electra(generator_config(shape, **generator), shape, sharing).eval()


def test_embeddings_are_shared_and_the_rest_is_not():
    model = electra()
    shared = {p.data_ptr() for p in model.generator.parameters()} & {
        p.data_ptr() for p in model.discriminator.parameters()
    }
    names = {name for name, p in model.generator.named_parameters() if p.data_ptr() in shared}
    assert names == {
        "embedding.weight", "encoder.types.weight", "encoder.position.weight", "encoder.embedding_norm.weight",
        "encoder.embedding_norm.bias",
    }  # fmt: skip
    assert model.generator.head.weight is model.discriminator.embedding.weight
    assert electra("none").generator.embedding is not electra("none").discriminator.embedding


@pytest.mark.parametrize("sharing", ["shared", "disentangled"])
def test_a_copy_shares_as_the_original_does(sharing):
    model, tokens = electra(sharing), torch.randint(50, (2, 12))
    copied, before = copy.deepcopy(model).double().float(), model.discriminator(tokens)
    with torch.no_grad():
        copied.generator.embedding.weight.mul_(2)
    assert torch.equal(model.discriminator(tokens), before)
    assert not torch.equal(copied.discriminator(tokens), before)


def test_a_disentangled_embedding_is_not_trained_by_the_discriminator():
    model = electra("disentangled", "deberta-v3", width=1.0, depth=0.5)
    model.discriminator(torch.randint(50, (2, 12))).sum().backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert model.discriminator.embedding.delta.grad.abs().sum() > 0


@pytest.mark.parametrize("sharing", ["shared", "disentangled", "none"])
def test_the_exported_discriminator_stands_alone(sharing):
    model, tokens = electra(sharing), torch.randint(50, (2, 12))
    if sharing == "disentangled":
        torch.nn.init.normal_(model.discriminator.embedding.delta)
    alone = model.exported()
    assert isinstance(alone, Transformer) and isinstance(alone.embedding, torch.nn.Embedding)
    torch.testing.assert_close(alone(tokens), model.discriminator(tokens), rtol=0, atol=0)


def test_embeddings_of_two_widths_are_refused():
    shape = preset("electra", **TINY)
    with pytest.raises(ValueError, match=r"generator's embedding is \[50, 16\] and the discriminator's \[50, 64\]"):
        Electra(preset("electra-generator", **TINY, embedding_dim=None), shape)
    with pytest.raises(ValueError, match="sharing"):
        Electra(generator_config(shape), shape, "half")

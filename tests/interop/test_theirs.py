"""transformers' own tests that one implementation of attention computes what another does, with ours in the place of
"sdpa", of a flash attention and of "flex_attention".

FASTLM_TRANSFORMERS_TESTS names the folder tests/ of transformers' source distribution, in the version that is
installed. What the door refuses, it must refuse in words.
"""

import copy
import importlib.util
import inspect
import os
import sys
import types
import unittest
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, L, tiny, transformers

import fastlm.interop

pytestmark = [pytest.mark.slow, pytest.mark.sweep]
FAMILIES = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt2 gpt_neox bert roberta electra bart t5 bloom mpt"
REFUSED = {"output_attentions": "does not serve output_attentions"}
ROWS, EOS = 7, 2  # with fewer rows, they would add some of their own, in which EOS stands anywhere
MODULE = "transformers_tests"
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
STANDS_FOR = ('"sdpa"', '"flex_attention"')


class Family:
    """What their tests ask of the tests of one family: its config, made tiny, and what its models are run on."""

    batch_size, seq_length, num_choices = ROWS, L, 2

    def __init__(self, family: str):
        self.family = family

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PreTrainedConfig, dict]:
        config, draw = tiny(self.family), torch.Generator().manual_seed(0)
        words = torch.randint(5, VOCABULARY - 3, (2, ROWS, L), generator=draw)
        words[..., -1] = EOS  # which some heads for rows read
        ones = torch.ones(ROWS, L, dtype=torch.long)
        given = {"input_ids": words[0], "attention_mask": ones}
        if config.is_encoder_decoder:
            given |= {"decoder_input_ids": words[1], "decoder_attention_mask": ones}
        return config, copy.deepcopy(given)


def their_tests() -> types.ModuleType | None:
    folder = os.environ.get("FASTLM_TRANSFORMERS_TESTS")
    if folder is None:
        return None
    for name, mixin in ABSENT.items():  # what the source distribution leaves out
        for whole in (MODULE, f"{MODULE}.{name.split('.')[0]}", f"{MODULE}.{name}"):
            sys.modules.setdefault(whole, types.ModuleType(whole)).__path__ = []
        setattr(sys.modules[f"{MODULE}.{name}"], mixin, type(mixin, (), {}))
    source = (Path(folder) / "test_modeling_common.py").read_text()
    for name in STANDS_FOR:
        source = source.replace(name, '"fastlm"')
    spec = importlib.util.spec_from_loader(f"{MODULE}.test_modeling_common", loader=None)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        exec(compile(source, spec.name, "exec"), vars(module))
    return module


def models(family: str) -> tuple[type, ...]:
    """Those of transformers that this family's config makes."""
    module = sys.modules[transformers.AutoModel._model_mapping[transformers.CONFIG_MAPPING[family]].__module__]
    known = [kind for name in module.__all__ if isinstance(kind := getattr(module, name), type)]
    of_family = lambda kind: kind.config_class is transformers.CONFIG_MAPPING[family]
    return tuple(k for k in known if issubclass(k, transformers.PreTrainedModel) and of_family(k) and _whole(k))


def _whole(kind: type) -> bool:
    return "pretrained" not in kind.__name__.lower() and not kind.__name__.endswith("EncoderModel")


THEIRS = their_tests()
CASES = {}
if THEIRS is not None:
    MIXIN = THEIRS.ModelTesterMixin
    MATCHES = [name for name in dir(MIXIN) if name.startswith("test_eager_matches_sdpa_inference_")]
    CASES = {name: getattr(MIXIN, name) for name in [*MATCHES, "test_can_set_attention_dynamically"]}
    CASES["test_flex_attention_with_grads"] = inspect.unwrap(MIXIN.test_flex_attention_with_grads)  # on a CPU too
    for side in ("left", "right"):
        CASES[f"flash_attn_inference_equivalence_{side}"] = lambda case, side=side: (
            case.flash_attn_inference_equivalence("fastlm", side)
        )
    CASES["flash_attn_from_config"] = lambda case: case.flash_attn_from_config("fastlm")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES.split())
def test_as_they_say(family, name):
    fastlm.interop.register()
    case = type(family, (MIXIN, unittest.TestCase), {"all_model_classes": models(family)})()
    case.model_tester = Family(family)
    refused = next((words for what, words in REFUSED.items() if name.endswith(what)), None)
    with pytest.raises(NotImplementedError, match=refused) if refused else nullcontext():
        CASES[name](case)


def test_the_folder_is_named():
    if THEIRS is None:
        pytest.skip(
            "FASTLM_TRANSFORMERS_TESTS is unset; unpack what `pip download --no-deps --no-binary transformers "
            f"transformers=={transformers.__version__}` brings, pip install parameterized, and set it to its tests/"
        )
    assert len(CASES) > 20

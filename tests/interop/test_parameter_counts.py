"""How many parameters the presets have, counted on the meta device, beside what papers and checkpoints say."""

import pytest
import torch
from checkpoints import transformers

from fastlm.interop import model_type
from fastlm.interop.families import FAMILIES
from fastlm.models import Transformer
from fastlm.models.presets import SIZES, preset

EXACT = {
    "gpt2": 124_439_808,
    "bert-base": 110_106_428,  # with both heads
    "roberta-base": 124_697_433,
    "t5-small": 60_506_624,
    "llama-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "bloom-560m": 559_214_592,
    "mpt-7b": 6_649_286_656,
}


def count(name: str, **changes) -> int:
    with torch.device("meta"):
        return Transformer(preset(name, **changes)).parameter_count()


@pytest.mark.parametrize("name", EXACT)
def test_presets_have_the_checkpoints_count(name):
    assert count(name) == EXACT[name]


@pytest.mark.parametrize(
    "name, changes, millions",
    [
        ("albert-base", dict(head="none"), 12),
        ("albert-large", dict(head="none"), 18),
        ("bert-base", dict(head="none", pair_labels=0, vocab_size=30000), 108),
        ("bert-large", dict(head="none", pair_labels=0, vocab_size=30000), 334),
    ],
)
def test_alberts_table(name, changes, millions):
    """Lan et al. 2020, table 1: ALBERT with its pooler, BERT without one and with ALBERT's vocabulary."""
    assert round(count(name, **changes) / 1e6) == millions


def test_what_alberts_table_rounds_otherwise():
    """It has 60 M for xlarge and 235 M for xxlarge. The layout that it describes, which is the released checkpoints',
    has no count of 235 M, whichever heads are counted.
    """
    assert count("albert-xlarge", head="none") == 58_728_962 and count("albert-xlarge") == 59_021_490
    assert count("albert-xxlarge", head="none") == 222_603_778 and count("albert-xxlarge") == 223_158_450


@pytest.mark.parametrize("name", {model_type(c): name for name, c in reversed(SIZES.items())}.values())
def test_transformers_counts_as_many(name):
    """A size of each family, made by transformers from the config that we would write."""
    config = SIZES[name]
    family = FAMILIES[model_type(config)]
    if family.model_type == "fastlm":
        pytest.skip("transformers has no such model")
    entries = family.entries(config)
    (architecture,) = entries.pop("architectures")
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**entries))
        if not config.tie_embeddings and family.model_type == "t5":  # transformers 5 unties T5 where it loads it
            theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())
    constants = config.vocab_size if family.model_type == "bart" else 0  # its final_logits_bias
    constants += config.context * config.dim if config.mask_decoder else 0  # which transformers has none of
    assert sum(p.numel() for p in theirs.parameters()) + constants == count(name)

"""Attention's terms, masks, sizes and strides in combination: drawn at random against the definition, and twenty times
the same to the bit.
"""

import pytest
import torch
from cases import COMBINED
from draws import arguments
from hypothesis import given, settings
from tolerance import assert_attention_accurate, assert_repeats

from fastlm.backends import native

CPU = torch.device("cpu")
if native.cpp_missing(CPU):
    pytest.skip(native.cpp_missing(CPU), allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned_cpp")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(arguments())
def test_what_is_drawn_is_accurate(args):
    assert_attention_accurate(args, ulps=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", COMBINED, ids=str)
def test_twenty_times_the_same_bits(case, dtype, threads):
    threads(5)
    assert_repeats(case.make(dtype, CPU))

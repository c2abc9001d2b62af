"""Attention in C++ on several threads: the same bits for any number of them, and no copies of a sum.

Results start as NaN (conftest.py). The same calls under a sanitizer of threads: csrc/test_sanitizers.py.
"""

import os
from pathlib import Path

import pytest
import torch
from chosen import MANY_TERMS, MANY_TURNS, arguments, draw, results, taken_in_turns, with_terms
from tolerance import assert_attention_accurate

from fastlm.backends import native
from fastlm.ops.attention import LEARNED, attention, attention_backward

CPU = torch.device("cpu")
if native.cpp_missing(CPU):
    pytest.skip(native.cpp_missing(CPU), allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned_cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*MANY_TURNS, *MANY_TERMS])
def test_cpp_bits_do_not_depend_on_threads(name, dtype, threads):
    args = taken_in_turns(name, dtype)
    threads(1)
    alone = results(args)
    for n in (2, 3, 7):
        threads(n)
        for key, got in results(args).items():
            assert torch.equal(got, alone[key]), f"{key} differs with {n} threads"
    assert_attention_accurate(args)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory is read from Linux's /proc"
)
@pytest.mark.parametrize(
    "terms", [["one bias"], ["bias of the batch"], ["bias of keys"], ["query vectors", "value vectors"]], ids=str
)
def test_cpp_backward_keeps_one_sum(terms, monkeypatch):
    """Beside results: sums of the gradients' own size and of dk and dv, and what the threads need; no copy of them for
    each row and head.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from machine import peak_growth

    args = with_terms(arguments(B=16, H=8, Hk=8, Lq=512, Lk=512, D=32), terms)
    out, lse = attention(args)
    call = lambda: attention_backward(
        draw(*out.shape, seed=4), None, out, lse, args, [getattr(args, name) is not None for name in LEARNED]
    )
    gradients = sum(x.nbytes for x in call())
    assert peak_growth(call) < 2 * gradients + args.k.nbytes + 2**22

"""Attention in C++ on several threads: the same bits for any number of them, and no copies of a sum.

The sanitizer of threads runs this file too (test_native.py). Results start as NaN (conftest.py).
"""

import os
from pathlib import Path

import pytest
import torch
from chosen import MASKS, arguments, draw, results, with_terms
from tolerance import assert_attention_accurate

from fastlm.backends import native
from fastlm.ops.attention import LEARNED, attention, attention_backward

CPU = torch.device("cpu")
if native.cpp_missing(CPU):
    pytest.skip(native.cpp_missing(CPU), allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned_cpp")

MANY_TURNS = {  # several units of work for each key head, more than one tile of keys
    "bidirectional": dict(H=2, Hk=1, Lq=600, Lk=520),
    "causal": dict(H=2, Hk=2, Lq=700, Lk=700, right=0),
    "diagonal": dict(Lq=600, Lk=600, left=0, right=0),  # neighbouring units share no key
    "window": dict(Lq=600, Lk=600, left=70, right=3),
    "lengths": dict(B=2, H=2, Hk=1, Lq=530, Lk=400, key_lengths=torch.tensor([130, 400])),
    "wide": dict(H=2, Hk=1, Lq=300, Lk=200, D=256),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MANY_TURNS)
def test_cpp_bits_do_not_depend_on_threads(name, dtype, threads):
    args = arguments(dtype=dtype, **MANY_TURNS[name])
    threads(1)
    alone = results(args)
    for n in (2, 3, 7):
        threads(n)
        for key, got in results(args).items():
            assert torch.equal(got, alone[key]), f"{key} differs with {n} threads"
    assert_attention_accurate(args)


MANY_TERMS = {
    "masks": (MASKS, dict(B=2, H=2, Hk=1, Lq=530, Lk=400, left=40, right=0)),
    "prefix of a window": (["prefix", "value vectors"], dict(B=2, Lq=600, Lk=600, left=20, right=3)),
    "dropout and biases": (["dropout", "bias of keys", "groups"], dict(B=2, H=2, Hk=1, Lq=530, Lk=400)),
    "bias of the batch": (["bias of the batch"], dict(B=3, H=2, Hk=1, Lq=530, Lk=400, right=0)),
    "bias of heads": (["bias of heads", "prefix"], dict(B=2, H=6, Hk=2, Lq=300, Lk=400)),
    "one bias": (
        ["one bias", "ranks"],
        dict(B=3, H=4, Hk=2, Lq=530, Lk=200, left=300, key_lengths=torch.tensor([200, 70, 0])),
    ),
    "vectors of a batch": (
        ["query vectors", "value vectors"],
        dict(B=3, H=1, Hk=1, Lq=600, Lk=600, D=16, left=100, right=100),
    ),
    "vectors of a ragged batch": (
        ["key vectors"],
        dict(B=4, H=2, Hk=1, Lq=300, Lk=500, D=16, right=0, key_lengths=torch.tensor([0, 500, 90, 300])),
    ),
    "vectors": (
        ["query vectors", "key vectors and positions", "value vectors"],
        dict(B=2, H=4, Hk=2, Lq=520, Lk=200, D=16, right=0),
    ),
    "all": (
        ["prefix", "ranks", "dropout", "bias", "query vectors and positions", "key vectors", "value vectors"],
        dict(H=2, Hk=1, Lq=300, Lk=330, right=0),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MANY_TERMS)
def test_cpp_bits_of_terms_do_not_depend_on_threads(name, dtype, threads):
    terms, sizes = MANY_TERMS[name]
    args = with_terms(arguments(dtype=dtype, offset=sizes.get("Lk") - sizes["Lq"], **sizes), terms)
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

"""Few queries of many keys by Triton: on the GPU if there is one, compiled; else in Triton's interpreter
(tests/conftest.py says so).
"""

import pytest
import torch
from cases import ATTENTION
from draws import arguments
from hypothesis import HealthCheck, assume, given, settings
from tolerance import assert_attention_accurate, assert_repeats

import fastlm
from fastlm.backends import native
from fastlm.ops.attention import Arguments, attention

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fastlm.kernels import decoding, launch
from fastlm.kernels.tiles import Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILED = not native.interpreting()
NAMED = {case.name: case for case in ATTENTION}

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture
def few(monkeypatch):
    """Short rows are split too, into shares of a tile of 16 keys. Calls that were."""
    for name, least in (("LEAST_KEYS", 1), ("LEAST_TILES", 1), ("MOST_SPLITS", 4)):
        monkeypatch.setattr(decoding, name, least)
    real = launch.tiles
    small = lambda kernel, *rest: Tiles(64, 16, 4, 2) if kernel == "split" else real(kernel, *rest)
    monkeypatch.setattr(launch, "tiles", small)
    split, made = decoding.launch, []
    monkeypatch.setattr(decoding, "launch", lambda kernel, *rest: (made.append(kernel), split(kernel, *rest)))
    return made


@settings(
    max_examples=5 if COMPILED else 40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(args=arguments(longest=40, widest=20, device=DEVICE))
def test_what_is_drawn_is_accurate(few, args):
    """With the gradient, which reads the log-sum-exp."""
    args = args._replace(**{name: None for name in launch.VECTORS}, q_position=None, k_position=None, buckets=None)
    assume(decoding.has_few_queries(args))
    few.clear()
    with fastlm.use_backend("triton"):
        assert_attention_accurate(args, ulps=64)
    assert few


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["every_mask", "bias_heads", "softcap_bias_dropout"])
def test_named_cases_are_accurate(few, name, dtype):
    with fastlm.use_backend("triton"):
        assert_attention_accurate(NAMED[name].make(dtype, DEVICE))
    assert few


def decoding_call(dtype=torch.bfloat16, Lq=1, Lk=530, **changes) -> Arguments:
    g = torch.Generator().manual_seed(Lq)
    draw = lambda *shape, dtype=dtype: torch.randn(*shape, generator=g).to(DEVICE, dtype)
    q, k, v = draw(2, 4, Lq, 16), draw(2, 1, Lk, 16), draw(2, 1, Lk, 16)
    table = draw(4, Lq + Lk - 1, dtype=torch.float32)
    return Arguments.of(q, k, v, table=table, right=0, offset=Lk - Lq, **changes)


@pytest.mark.parametrize("Lq", [1, 3])
def test_it_repeats_and_is_accurate_at_its_own_sizes(Lq):
    args = decoding_call(Lq=Lq, key_lengths=torch.tensor([530, 0], device=DEVICE))
    assert decoding.has_few_queries(args) and decoding.key_splits(2, 9) == 2
    with fastlm.use_backend("triton"):
        assert_attention_accurate(args)
        assert_repeats(args, 20 if COMPILED else 2)


def test_a_share_that_sees_nothing_counts_for_nothing():
    """A window of the last keys, and a row without any: zeros and -∞."""
    args = decoding_call(torch.float32, left=5, key_lengths=torch.tensor([530, 0], device=DEVICE))
    with fastlm.use_backend("triton"):
        out, lse = attention(args)
    with fastlm.use_backend("reference"):
        expected = attention(args)
    torch.testing.assert_close((out, lse), expected, rtol=1e-5, atol=1e-5)
    assert not out[1].any() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize(
    "changes, few_queries",
    [
        (dict(), True), (dict(Lq=16), True), (dict(Lq=17), False), (dict(Lk=511), False), (dict(Lq=0), False),
        (dict(query_vectors=torch.empty(4, 530, 16)), False),
    ],
    ids=["one", "64 rows", "68 rows", "few keys", "none", "rows by distance"],
)  # fmt: skip
def test_which_calls_have_few_queries(changes, few_queries):
    assert decoding.has_few_queries(decoding_call(**changes)) == few_queries


@pytest.mark.parametrize(
    "heads, tiles, splits", [(8, 128, 32), (1, 128, 32), (64, 128, 5), (1000, 128, 1), (8, 8, 2), (8, 3, 1), (0, 0, 1)]
)
def test_shares_fill_a_gpu(heads, tiles, splits):
    assert decoding.key_splits(heads, tiles) == splits

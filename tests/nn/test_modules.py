"""The module and its cache: what they are made from, and given."""

import math

import pytest
import torch

from fastlm import attention
from fastlm.nn import Attention, KVCache
from fastlm.positions import ALiBi, RoPE, Sinusoidal, T5Bias

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dim="16"), "dim is '16'; give a whole number of at least 1"),
        (dict(dim=0), "dim is 0; give a whole number"),
        (dict(heads=2.0), "heads is 2.0; give a whole number"),
        (dict(heads=3), "heads must divide dim and kv_heads must divide heads; got dim 16, heads 3, kv_heads 3"),
        (dict(kv_heads=True), "kv_heads is True; give a whole number"),
        (dict(dropout="0.1"), r"dropout is '0.1'; give a number in \[0, 1\)"),
        (dict(dropout=math.nan), "dropout is nan"),
        (dict(softcap=0.0), "softcap is 0.0; give a positive, finite number"),
        (dict(window="3"), "window is '3'"),
        (dict(causal=None), "causal is None; give True or False"),
        (dict(bias="no"), "bias is 'no'; give True or False"),
        (dict(position=T5Bias), r"position is <class .*T5Bias'>; give a scheme, such as fastlm.positions.ALiBi\(2\)"),
        (dict(position="rop"), "position 'rop' is unknown; choose from alibi"),
        (dict(position="learned"), "position 'learned' adds to token embeddings"),
    ],
)
def test_a_module_is_made_from_what_fits(change, message):
    with pytest.raises(ValueError, match=message):
        Attention(**dict(dim=16, heads=2) | change)


def test_a_softcap_bounds_scores():
    capped, free = (Attention(16, 2, softcap=softcap) for softcap in (0.1, None))
    free.load_state_dict(capped.state_dict())
    q, k, v = free.split(free.qkv(X), 2, 2, 2)
    heads = attention(q, k, v, causal=True, softcap=0.1)
    torch.testing.assert_close(capped(X), free.out(heads.transpose(1, 2).flatten(2)))
    assert (capped(X) - free(X)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "position, x, message",
    [
        (None, X[0], r"Attention takes x \[B, L, dim\] with dim 16; got \[5, 16\]"),
        (None, X[..., :8], r"with dim 16; got \[2, 5, 8\]"),
        (None, X.numpy(), r"with dim 16; got ndarray"),
        (RoPE(4), X, "position turns heads of 4 channels, and query's have 8"),
        (ALiBi(3), X, r"table must be \[heads, Lq \+ Lk - 1\] = \[2, 9\]; got \[3, 9\]"),
        (Sinusoidal(16), X, "position 'sinusoidal' adds to token embeddings"),
    ],
)
def test_a_module_is_given_what_fits(position, x, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, 2, position=position)(x)


@pytest.mark.parametrize("cache", [{}, [], (X, X), 0, "none"], ids=lambda x: type(x).__name__)
def test_a_cache_is_a_cache(cache):
    with pytest.raises(ValueError, match=rf"cache is of type {type(cache).__name__}; give a fastlm.nn.KVCache\(\)"):
        Attention(16, 2)(X, cache=cache)


def test_an_empty_cache_is_one():
    """`if cache` asks whether there is any."""
    cache = KVCache()
    assert cache and len(cache) == 0
    Attention(16, 2)(X, cache=cache)
    assert cache and len(cache) == 5


def test_a_cache_is_for_one_batch_of_one_layer():
    cache = KVCache()
    Attention(16, 2)(X, cache=cache)
    for layer, x, shape in (
        (Attention(16, 2), X[:1], "1, 2, 5, 8"),
        (Attention(16, 4), X, "2, 4, 5, 4"),
        (Attention(16, 2, 1), X, "2, 1, 5, 8"),
    ):
        message = rf"the cache holds keys \[2, 2, 5, 8\] and is given \[{shape}\], .* takes a KVCache\(\) of its own"
        with pytest.raises(ValueError, match=message):
            layer(x, cache=cache)
    assert len(cache) == 5


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused_in_any_model():
    for model in (Attention(16, 2), torch.nn.Sequential(torch.nn.Linear(4, 16), Attention(16, 2))):
        with pytest.raises(
            RuntimeError, match=r"fastlm\.nn\.Attention is not for torch\.jit\.script; use torch\.compile"
        ):
            torch.jit.script(model)


def test_rows_are_places_among_the_queries_of_order():
    layer, ranks = Attention(16, 2, causal=False), torch.arange(5).expand(2, 5)
    whole = layer(X, order=(ranks, ranks))
    places = torch.tensor([[4, 1], [0, 3]])
    few = X.gather(1, places[:, :, None].expand(-1, -1, 16))
    got = layer(few, keys=layer.keys(X), order=(ranks, ranks), rows=places)
    torch.testing.assert_close(got, whole.gather(1, places[:, :, None].expand(-1, -1, 16)))
    for wrong in (places[:1], places[:, :1]):
        with pytest.raises(ValueError, match=r"rows must be \[2, 2\], a place for each of x's rows; got"):
            layer(few, keys=layer.keys(X), order=(ranks, ranks), rows=wrong)
    with pytest.raises(ValueError, match="rows say where queries stand among those of order"):
        layer(few, keys=layer.keys(X), rows=places)


def test_a_cache_takes_keys_and_values_of_the_same_tokens():
    keys = torch.zeros(2, 4, 3, 8)
    for values in (keys[:, :, :1], keys[:, :2], keys[:1]):
        with pytest.raises(ValueError, match="they are of the same tokens and heads"):
            KVCache().extend(keys, values)
    for capacity in (-1, "8", 1.5):
        with pytest.raises(ValueError, match="capacity is"):
            KVCache(capacity)

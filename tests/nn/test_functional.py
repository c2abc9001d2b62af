"""fastlm.attention and rotate refuse what does not fit, in words: what was made for another size, what is of another
type, what other libraries call by another name.
"""

import warnings

import numpy as np
import pytest
import torch
from cases import POSITIONS, position

import fastlm
from fastlm.backends import native
from fastlm.nn import checks
from fastlm.positions import DeBERTa, RoPE, Shaw, T5Bias, Terms, TransformerXL, Vectors

X = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", POSITIONS)
def test_terms_are_for_calls_of_their_size(name):
    """Not of all with as many queries and keys together, and not from another position on."""
    scheme = position(name, 2, 8, True)
    k, q = X, X[:, :, 1:]
    expected = fastlm.attention(q, k, k, position=scheme, causal=True)
    assert torch.equal(fastlm.attention(q, k, k, position=scheme.terms(3, 4), causal=True), expected)
    message = r"made for Lq, Lk, offset = 4, 3, -1, and this call has 3, 4, 1; make them by position.terms\(3, 4, 1\)"
    with pytest.raises(ValueError, match=message):
        fastlm.attention(q, k, k, position=scheme.terms(4, 3), causal=True)
    for made, asked in ((0, None), (None, 0), (2, 1)):
        with pytest.raises(ValueError, match=rf"Lq, Lk, offset = 3, 4, {1 if made is None else made}, and this call"):
            fastlm.attention(q, k, k, position=scheme.terms(3, 4, made), causal=True, offset=asked)


def test_a_compiled_model_shares_terms_at_every_length():
    scheme = T5Bias(2)

    def two_layers(q, k):
        terms = scheme.terms(q.shape[2], k.shape[2])
        q = fastlm.attention(q, k, k, position=terms, causal=True)
        return fastlm.attention(q, k, k, position=terms, causal=True)

    torch.compiler.reset()
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for Lq, Lk in ((3, 9), (4, 12), (7, 11)):
            q, k = torch.randn(1, 2, Lq, 8), torch.randn(1, 2, Lk, 8)
            assert torch.equal(compiled(q, k), two_layers(q, k))


@pytest.mark.parametrize(
    "made, message",
    [
        (RoPE(4), "position turns heads of 4 channels, and query's have 8; make it for head_dim 8, of which"),
        (RoPE(16, fraction=0.5).terms(4, 4), "position turns heads of 16 channels, and query's have 8"),
        (Shaw(2, 4), r"query_vectors must be \[heads, Lq \+ Lk - 1, D\] = \[2, 7, 8\]; got \[2, 7, 4\]"),
        (TransformerXL(16, 1, 8), r"query_vectors must be .* = \[2, 7, 8\]; got \[1, 7, 8\]"),
        (Terms(vectors=Vectors(content_bias=torch.zeros(1, 8))), r"content_bias must be \[heads, D\] = \[2, 8\]"),
        (Terms(table=torch.zeros(1, 7)), r"table must be \[heads, Lq \+ Lk - 1\] = \[2, 7\]; got \[1, 7\]"),
    ],
)
def test_a_scheme_is_for_heads_of_its_size(made, message):
    with pytest.raises(ValueError, match=message):
        fastlm.attention(X, X, X, position=made)


def test_a_part_of_the_channels_turns_when_it_is_asked_for():
    whole, part = (fastlm.attention(X, X, X, position=RoPE(8, fraction=f)) for f in (1.0, 0.5))
    assert not torch.equal(whole, part)


def test_a_causal_scheme_tells_when_it_sees_later_keys():
    """And only then: not when causal, decoding, or looking back alone."""
    scheme, message = T5Bias(2), "made with causal=True and .* causal=True, or the scheme causal=False"
    for given in (scheme, scheme.terms(4, 4)):
        with pytest.warns(UserWarning, match=message) as told:
            fastlm.attention(X, X, X, position=given)
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlm.attention(X, X, X, position=scheme, causal=True, prefix=torch.tensor([2, 0]))
        fastlm.attention(X, X, X, position=scheme, window=(3, 0))
        fastlm.attention(X[:, :, 3:], X, X, position=scheme)
        fastlm.attention(X, X, X, position=T5Bias(2, causal=False))
        run = lambda x: fastlm.attention(x, x, x, position=scheme)
        torch.compile(run, fullgraph=True, backend="aot_eager")(X)


TWELVE = torch.arange(12)[None]
MASKS = {
    "causal": dict(causal=True),
    "window": dict(window=(3, 0)),
    "segments": dict(segments=(TWELVE >= 8).long()),
    "order": dict(order=(TWELVE, TWELVE)),
}


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("mask", MASKS)
def test_on_the_way_there_masked_keys_may_hold_anything(mask, backend):
    """More than is promised, for a GPU's plain attention is PyTorch's; not values, nor keys on the way back, which sums
    meet with weight zero (fastlm/ops/attention.py).
    """
    if backend != "reference" and getattr(native, f"{backend}_missing")(torch.device("cpu")):
        pytest.skip(getattr(native, f"{backend}_missing")(torch.device("cpu")))
    q, k, v = (torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    with fastlm.use_backend(attention=backend):
        clean = fastlm.attention(q, k, v, **MASKS[mask])[:, :, :8]
        for anything in (torch.nan, torch.inf, -torch.inf):
            k[:, :, 8:] = anything
            torch.testing.assert_close(fastlm.attention(q, k, v, **MASKS[mask])[:, :, :8], clean)


@pytest.mark.parametrize("name", checks.ELSEWHERE)
def test_other_libraries_names_are_known(name):
    with pytest.raises(TypeError, match=rf"attention takes no {name}; give \w"):
        fastlm.attention(X, X, X, **{name: None})


def test_misspelt_arguments_are_known():
    with pytest.raises(TypeError, match=r"attention takes no casual; did you mean causal\?"):
        fastlm.attention(X, X, X, casual=True)
    with pytest.raises(TypeError, match="attention takes no foo; it takes query, key, value, position, bias, "):
        fastlm.attention(X, X, X, foo=True)


NUMBER = "it must be a positive, finite number"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=X.numpy()), r"query is of type ndarray; give a tensor, torch.as_tensor\(query\)"),
        (dict(key=None), "key is of type NoneType; give a tensor"),
        (dict(query=X[0], key=X[0], value=X[0]), r"got query \[2, 4, 8\], .* one head by x\[:, None\], or heads"),
        (dict(bias=np.zeros((1, 1, 4, 4))), "bias is of type ndarray; give a tensor"),
        (dict(bias=0.5), "bias is of type float; give a tensor"),
        (dict(prefix=2), "prefix is of type int; give a tensor"),
        (dict(scale="1"), f"scale is '1'; {NUMBER}"),
        (dict(scale=True), f"scale is True; {NUMBER}"),
        (dict(scale=torch.tensor(0.5)), rf"scale is tensor\(0.5000\); {NUMBER}; to learn it, multiply query by it"),
        (dict(dropout="0.1"), r"dropout is '0.1'; it must be a number in \[0, 1\)"),
        (dict(dropout=None), "dropout is None; it must be a number"),
        (dict(dropout=True), "dropout is True; it must be a number"),
        (dict(dropout=torch.nan), "dropout is nan; it must be a number"),
        (dict(seed=True), "seed is True; it must be an int"),
        (dict(offset=True), "offset is True; it must be an int"),
        (dict(offset="1"), "offset is '1'; it must be an int"),
        (dict(window="3"), r"window is '3'; give \(left, right\)"),
        (dict(window=3.0), r"window is 3.0; give \(left, right\)"),
        (dict(window=()), r"window is \(\); give \(left, right\)"),
        (dict(window=(True, None)), r"window is \(True, None\); give \(left, right\)"),
        (dict(window=torch.tensor(3)), r"window is tensor\(3\); give \(left, right\)"),
        (dict(causal=None), "causal is None; give True or False"),
        (dict(return_lse="yes"), "return_lse is 'yes'; give True or False"),
        (dict(key=X.to_sparse()), r"key is sparse \(torch.sparse_coo\); give a dense tensor, key.to_dense\(\)"),
        (dict(bias=torch.zeros(2, 2, 4, 4).to_sparse()), "bias is sparse"),
        (dict(key_lengths=torch.ones(3, dtype=torch.long)), r"key_lengths must be \[2\] integers; got \[3\]"),
        (dict(segments=torch.zeros(1, 4, dtype=torch.long)), r"must be \[2, 4\] integers; got .*, so .expand it"),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        fastlm.attention(**dict(query=X, key=X, value=X) | change)


ANGLES = torch.randn(4, 4)


@pytest.mark.parametrize(
    "given, message",
    [
        ((X.numpy(), ANGLES, ANGLES), "x is of type ndarray; give a tensor"),
        ((X, ANGLES, None), "sin is of type NoneType; give a tensor"),
        ((X.long(), ANGLES, ANGLES), "x is torch.int64, and channels turn by fractions; give floats"),
        ((X, ANGLES.long(), ANGLES.long()), "cos is torch.int64, and channels turn by fractions; give floats"),
        ((X, ANGLES[:3], ANGLES[:3]), r"rotate takes x .* got x \[2, 2, 4, 8\], cos \[3, 4\], sin"),
        ((X, ANGLES.expand(3, -1, -1), ANGLES.expand(3, -1, -1)), "x has 2 rows in its batch, cos and sin have 3"),
        ((X, ANGLES[:, :0], ANGLES[:, :0]), "cos and sin turn 0 channels, but x has 8"),
        ((X, ANGLES.to("meta"), ANGLES.to("meta")), "cos is on meta and query or x on cpu"),
    ],
)  # fmt: skip
def test_rotate_names_what_does_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        fastlm.rotate(*given)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    """A trace would keep the lengths of the call that it saw."""
    run = {"attention": lambda x: fastlm.attention(x, x, x), "rotate": lambda x: fastlm.rotate(x, ANGLES, ANGLES)}
    for name, f in run.items():
        with pytest.raises(ValueError, match=f"torch.jit.trace would keep .* of fastlm.{name} .*; use torch.compile"):
            torch.jit.trace(f, (X,))
        with pytest.raises(RuntimeError, match=f"fastlm.{name} is not for torch.jit.script; use torch.compile"):
            torch.jit.script(getattr(fastlm, name))


def test_terms_may_turn_queries_or_keys_alone():
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
    rope = RoPE(8).terms(6, 6)
    turn = lambda x, pair: fastlm.rotate(x, *pair, layout=rope.layout)
    queries, keys = turn(q, rope.rotate_q), turn(k, rope.rotate_k)
    alone = lambda **turns: fastlm.attention(q, k, v, position=Terms(layout=rope.layout, **turns))
    torch.testing.assert_close(alone(rotate_q=rope.rotate_q), fastlm.attention(queries, k, v))
    torch.testing.assert_close(alone(rotate_k=rope.rotate_k), fastlm.attention(q, keys, v))
    with pytest.raises(ValueError, match=r"the position's rotate_k is of type Tensor; give \(cos, sin\), or None"):
        alone(rotate_k=rope.rotate_k[0])


@pytest.mark.parametrize("scheme", [DeBERTa, TransformerXL])
def test_a_scheme_of_a_stack_says_so_when_it_is_called_alone(scheme):
    made = scheme(dim=8, heads=2, head_dim=8, shared=True)
    with pytest.raises(ValueError, match=r"was made with shared=True, .* make it with shared=False to stand alone"):
        fastlm.attention(X, X, X, position=made)

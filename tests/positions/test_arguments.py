"""What schemes are made from, and for: bad numbers, missing facts and classes that do nothing are refused in words."""

import inspect
import math

import numpy as np
import pytest

from fastlm import positions
from fastlm.positions import SCHEMES, NoPosition, Position, RoPE, XLNet, frequencies, make

FITTING = dict(dim=16, heads=2, head_dim=8, context=9)
CLASSES = {cls.__name__: cls for cls in (*SCHEMES.values(), XLNet)}
ARGUMENTS = [
    (cls, name)
    for cls in CLASSES.values()
    for name, p in inspect.signature(cls).parameters.items()
    if name not in ("layout", "scaling") and p.kind is p.POSITIONAL_OR_KEYWORD
]


@pytest.mark.parametrize("value", ["4", None, math.nan, math.inf, -3, 2.5, [2]], ids=repr)
@pytest.mark.parametrize("cls, name", ARGUMENTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_no_constructor_takes_what_is_no_number(cls, name, value):
    if (name, value) == ("base", 2.5) or (name, value) == ("norm_eps", 2.5):
        return
    fitting = {fact: FITTING[fact] for fact in inspect.signature(cls).parameters.keys() & FITTING.keys()}
    with pytest.raises(ValueError, match=rf"{name}( is|; got) {value!r}".replace("[", r"\[")):
        cls(**fitting | {name: value})


@pytest.mark.parametrize("cls, name", ARGUMENTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_true_is_no_number_and_numpys_integers_are(cls, name):
    fitting = {fact: np.int64(FITTING[fact]) for fact in inspect.signature(cls).parameters.keys() & FITTING.keys()}
    scheme = cls(**fitting)
    if not scheme.embeds():
        assert scheme.terms(3, 3).size == (3, 3, 0)
    if isinstance(inspect.signature(cls).parameters[name].default, bool):
        return
    with pytest.raises(ValueError, match=f"{name} is True"):
        cls(**fitting | {name: True})


SCALINGS = {
    "interpolate": dict(factor=4.0),
    "ntk": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_context=64, beta_fast=32, beta_slow=1),
    "llama3": dict(factor=4.0, original_context=64, low=1, high=4),
}


@pytest.mark.parametrize("value", ["4", None, math.nan, math.inf, -1, 0, True], ids=repr)
@pytest.mark.parametrize("name, argument", [(name, given) for name, all in SCALINGS.items() for given in all])
def test_no_scaling_takes_what_is_no_positive_number(name, argument, value):
    with pytest.raises(ValueError, match=f"{value!r}"):
        getattr(frequencies, name)(**SCALINGS[name] | {argument: value})


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: RoPE(8, base=1.0), "base is 1.0; give a number > 1, such as 10000.0"),
        (lambda: RoPE(8, base=0.0), "base is 0.0; give a number > 1"),
        (lambda: RoPE(8, layout="diagonal"), "layout is 'diagonal'; choose from 'half', 'interleaved', 'proportional'"),
        (
            lambda: RoPE(8, scaling="yarn"),
            "scaling is 'yarn'; give a function such as fastlm.positions.frequencies.yarn",
        ),
        (lambda: frequencies.yarn(4.0, 64, 1, 32), "from beta_slow 32 up to beta_fast 1; give beta_fast ≥ beta_slow"),
        (lambda: positions.alibi_slopes(0), "heads is 0; give a whole number of at least 1"),
        (lambda: positions.Sinusoidal(0), "dim is 0; give a whole number of at least 2"),
    ],
)
def test_numbers_out_of_range_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


@pytest.mark.parametrize(
    "name, facts, message",
    [
        ("t5", dict(heads=2, bukets=4), "position 't5' takes no bukets; did you mean buckets.; it takes heads, causal"),
        ("rope", {}, "position 'rope' wants the model's head_dim; give head_dim="),
        ("none", dict(depth=3), "position 'none' takes no depth; it takes "),
    ],
)
def test_make_knows_what_a_scheme_takes(name, facts, message):
    with pytest.raises(TypeError, match=message):
        make(name, **facts)


def test_make_hands_on_what_it_is_given():
    assert make("rope", head_dim=8, heads=2, fraction=0.5).terms(3, 3).rotate_q[0].shape == (3, 2)


def test_a_scheme_that_does_nothing_is_no_scheme():
    """A misspelt method would train as no position at all, without a word."""
    with pytest.raises(
        TypeError, match=r"Typo defines none of embed, angles, bias, vectors, .* but biases; did you mean"
    ):

        class Typo(Position, name="typo"):
            def biases(self, distance):
                return distance

    assert "typo" not in SCHEMES

    class Idle(Position):
        """Not registered, so that a class between Position and a scheme may do without; refused when it is used."""

    with pytest.raises(TypeError, match=r"Idle defines none of embed, angles, bias, vectors, .*; define one"):
        Idle().terms(3, 3)
    assert NoPosition().terms(3, 3).table is None

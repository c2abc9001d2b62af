"""Philox against the vectors its authors published, and what is drawn with its words."""

import pytest
import torch

from fastlm.backends.philox import philox
from fastlm.objectives import noise
from fastlm.objectives.noise import Purpose

# Random123, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, result
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("counter, key, result", VECTORS)
def test_published_vectors(counter, key, result):
    low, high = hexadecimal(key)
    got = philox(tuple(torch.tensor(word) for word in hexadecimal(counter)), high << 32 | low)
    assert [word.item() for word in got] == hexadecimal(result)


def test_a_draw_depends_on_its_name_alone():
    indices = torch.tensor([0, 9, 2**40])
    together = noise.draw(5, Purpose.NOISE, 3, indices, 7)
    for row, index in zip(together, indices.tolist(), strict=True):
        assert row.tolist() == noise.draw(5, Purpose.NOISE, 3, index, 7).tolist()
        assert row[:3].tolist() == noise.draw(5, Purpose.NOISE, 3, index, 3).tolist()


def test_draws_differ_in_every_part_of_their_name():
    names = [
        (0, Purpose.NOISE, 0, 0),
        (1, Purpose.NOISE, 0, 0),
        (0, Purpose.ORDER, 0, 0),
        (0, Purpose.NOISE, 1, 0),
        (0, Purpose.NOISE, 0, 1),
    ]
    assert len({tuple(noise.draw(*name, 4).tolist()) for name in names}) == len(names)


def test_draws_are_uniform():
    words = noise.draw(0, Purpose.NOISE, 0, torch.arange(10_000), 4) / 2**32
    assert abs(words.mean() - 0.5) < 0.005 and abs(words.std() - 12**-0.5) < 0.005


def test_numbers_never_change():
    """A run begun with one version of fastlm must see the same noise when another resumes it."""
    assert noise.number(0, Purpose.DROPOUT, 0, 5) == 4380600232804580672

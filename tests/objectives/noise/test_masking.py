"""Which tokens are hidden: whole words, runs of them, and never nothing."""

import numpy as np
import pytest
import torch

from fastlm.objectives import IGNORED, Masked, Vocabulary
from fastlm.objectives.noise import Purpose, Samples, draw
from fastlm.objectives.noise.masking import Masking, run_lengths, units_of

SIZE = 1000
WORDS = Vocabulary(SIZE, begins_word=torch.arange(SIZE) % 3 == 1)  # two thirds of the ids go on with a word
SAMPLES = Samples(0, torch.tensor(0), torch.arange(200))
ROWS = torch.from_numpy(np.random.default_rng(0).integers(5, SIZE, (200, 128)))
ROWS[:, ::41] = WORDS.eos


def hidden_in(masking, rows=ROWS, samples=SAMPLES, **options):
    """Which tokens of rows are targets, [B, L] bool."""
    hidden = masking.hide(rows, samples, WORDS, **options)
    assert all(len(set(row)) == len(row) for row in hidden.places.tolist())
    return torch.zeros_like(rows, dtype=torch.bool).scatter(1, hidden.places, hidden.labels != IGNORED)


def test_words_are_numbered():
    row = torch.tensor([[5, 7, 8, 9, 10, WORDS.eos, 11, 12, 13]])
    assert units_of(row, WORDS).tolist() == [[0, 1, 1, 1, 2, 3, 4, 4, 5]]


@pytest.mark.parametrize("ngram", [1, 3])
def test_a_word_is_hidden_whole_or_not_at_all(ngram):
    targets, units = hidden_in(Masking(whole_words=True, ngram=ngram)), units_of(ROWS, WORDS)
    assert (ROWS[targets] >= WORDS.specials).all()
    words = torch.zeros_like(units).scatter_add(1, units, torch.ones_like(units))
    of_word = torch.zeros_like(units).scatter_add(1, units, targets.long())
    part = ((of_word > 0) & (of_word < words)).sum(1)
    assert part.sum() == 0
    count = targets.sum(1)
    assert count.max() == 19 and count.min() >= 1 and count.float().mean() > 17


def test_runs_have_lengths_in_inverse_proportion():
    lengths = run_lengths(draw(0, Purpose.NOISE, 0, 0, 60_000), 3)
    shares = torch.bincount(lengths, minlength=4)[1:] / len(lengths)
    torch.testing.assert_close(shares, torch.tensor([6, 3, 2]) / 11, rtol=0, atol=0.01)


def test_geometric_runs_have_a_mean_of_3_8():
    """Joshi et al. 2020, sec. 3.1: Geo(0.2), at most 10."""
    lengths = run_lengths(draw(0, Purpose.NOISE, 0, 0, 60_000), 10, geometric=0.2)
    shares = torch.bincount(lengths, minlength=11)[1:] / len(lengths)
    expected = 0.8 ** torch.arange(10)
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=0.01)
    assert lengths.float().mean().item() == pytest.approx(3.8, abs=0.03)


def test_a_runs_tokens_become_alike():
    """Each word as one: of those of three tokens, none is in part <mask>, in part another."""
    hidden = Masking(rate=0.3, whole_words=True, alike=True).hide(ROWS, SAMPLES, WORDS)
    units = units_of(ROWS, WORDS).gather(1, hidden.places) + 128 * torch.arange(200)[:, None]
    at, target = hidden.inputs.gather(1, hidden.places), hidden.labels != IGNORED
    masked = torch.zeros(200 * 128).index_add(0, units[target], (at == WORDS.mask)[target].float())
    count = torch.zeros(200 * 128).index_add(0, units[target], torch.ones(int(target.sum())))
    assert ((masked == 0) | (masked == count)).all() and (count > 2).sum() > 300
    of_words = masked[count > 0] > 0
    assert of_words.float().mean().item() == pytest.approx(0.8, abs=0.03)


def test_runs_are_hidden_side_by_side():
    """Of single tokens few are neighbours, of runs of up to 3 many: about (2 · 3/11 + 3 · 2/11) of 18/11 tokens."""
    alone, runs = (hidden_in(Masking(ngram=n)) for n in (1, 3))
    pairs = lambda targets: (targets[:, 1:] & targets[:, :-1]).sum().item() / targets.sum().item()
    assert pairs(alone) < 0.2 and pairs(runs) > 0.4
    assert (alone.sum(1) == 19).all() and (runs.sum(1) == 19).all()


def test_a_row_has_at_least_one_target():
    long_word = torch.full((4, 40), 5)
    long_word[:, 0] = 7
    targets = hidden_in(Masking(whole_words=True), long_word, SAMPLES._replace(indices=torch.arange(4)))
    assert (targets.sum(1) == 6).all()  # as far as it fits
    lengths = torch.tensor([2, 10, 64, 128]).repeat(50)
    rows = torch.where(torch.arange(128) < lengths[:, None], ROWS.clamp(min=5), WORDS.pad)
    assert hidden_in(Masking(), rows, lengths=lengths).sum(1).tolist() == [1, 2, 10, 19] * 50


def test_words_must_be_known():
    with pytest.raises(ValueError, match="the vocabulary lacks begins_word"):
        Masked(np.zeros(500, np.uint16), 64, Vocabulary(SIZE), whole_words=True)

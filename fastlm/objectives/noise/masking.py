"""Which tokens of a row are hidden, and what stands in their place: what masked language models have in common."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.checks import flag, share, whole
from fastlm.objectives.base import IGNORED
from fastlm.objectives.noise.draws import WORD, Samples, pick
from fastlm.objectives.vocabulary import Vocabulary


class Hidden(NamedTuple):
    """Rows with hidden tokens.

    Args:
        inputs: [B, L] int64, the rows as the model sees them.
        places: [B, n] int64, where tokens were hidden, each place once.
        labels: [B, n] int64, the tokens that were there, or IGNORED where a row has fewer.
    """

    inputs: Tensor
    places: Tensor
    labels: Tensor


class Masking(NamedTuple):
    """A way to hide tokens.

    Args:
        rate: share of a row's tokens that are hidden. Default 0.15.
        mask: share of the hidden ones that become <mask>. Default 0.8.
        random: share that become another token; the others stay. Default 0.1.
        whole_words: whether a word is hidden whole or not at all. Default no.
        ngram: hidden are runs of n units (tokens, or whole words), n from 1 to ngram with p ∝ 1/n. Default 1.
        geometric: n has p ∝ (1 - geometric)ⁿ instead, if it is above 0. Default 0.
        alike: whether all tokens of a run become <mask>, or another token, or stay. Default no.
        first_rate: the rate at a run's beginning, which goes to `rate` in a straight line (Ankner et al. 2024). Default
            None: the same throughout.
    """

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    whole_words: bool = False
    ngram: int = 1
    geometric: float = 0.0
    alike: bool = False
    first_rate: float | None = None

    def at(self, progress: float) -> "Masking":
        """The way at a share of the run."""
        if self.first_rate is None:
            return self
        return self._replace(rate=self.first_rate + progress * (self.rate - self.first_rate))

    def count(self, context: int) -> int:
        """How many places a row has."""
        return round(self.rate * context)

    def check(self, context: int) -> None:
        """Raise ValueError for values out of range, and if rows have no places or nothing else."""
        share(rate=self.rate, mask=self.mask, random=self.random, geometric=self.geometric)
        share(**{"mask + random": self.mask + self.random})
        whole(1, ngram=self.ngram)
        flag(whole_words=self.whole_words, alike=self.alike)
        if self.first_rate is not None:
            self.at(0.0)._replace(first_rate=None).check(context)
        n = self.count(context)
        if n < 1:
            raise ValueError(f"rows of {context}, of which {self.rate:g} are not one target; give a larger --context")
        if n >= context:
            raise ValueError(f"rows of {context}, of which {self.rate:g} leave nothing to see; give a smaller rate")

    def hide(self, rows: Tensor, samples: Samples, vocabulary: Vocabulary, lengths: Tensor | None = None) -> Hidden:
        """Hide `count` tokens of each row. A special token is never hidden, nor is it what replaces one.

        Runs are laid side by side from the row's start on and taken in random order until there are enough tokens; of
        the last run those units are hidden that still fit, so that a row has fewer targets by less than a unit; the
        first unit is hidden as far as it fits.

        Args:
            rows: [B, L] int64.
            samples: whose noise it is.
            vocabulary: the ids' meaning.
            lengths: [B] int64, tokens of each row without <pad>; in a shorter one fewer are hidden, at least one. None:
                no row is shorter.
        """
        L, n = rows.shape[1], self.count(rows.shape[1])
        drawn = samples.draw(L + 2 * n + L * (2 if self.alike else self.ngram > 1))
        order, kinds, words, of_runs, of_kinds = drawn.tensor_split((L, L + n, L + 2 * n, 2 * L + 2 * n), -1)
        text = rows >= vocabulary.specials
        units = units_of(rows, vocabulary) if self.whole_words else torch.arange(L).repeat(len(rows), 1)
        runs = units
        if self.ngram > 1:
            ends = run_lengths(of_runs, self.ngram, self.geometric).cumsum(-1).expand_as(units).contiguous()
            runs = torch.searchsorted(ends, units, right=True)
        taken = order.expand_as(runs).gather(1, runs).masked_fill(~text, WORD).argsort(dim=-1, stable=True)
        places, there = taken[:, :n], rows.gather(1, taken[:, :n])
        count = torch.full_like(places[:, :1], n)
        if lengths is not None:
            count = (self.rate * lengths[:, None]).round().long().clamp(1, n)
        unit = units.gather(1, places)
        whole = (unit != units.gather(1, taken.gather(1, count))) | (unit == unit[:, :1])
        hidden = text.gather(1, places) & whole & (torch.arange(n) < count)
        kinds = of_kinds.expand_as(runs).gather(1, runs.gather(1, places)) if self.alike else kinds
        new = self.put_in(there, kinds, words, vocabulary)
        inputs = rows.scatter(1, places, torch.where(hidden, new, there))
        return Hidden(inputs, places, there.masked_fill(~hidden, IGNORED))

    def put_in(self, tokens: Tensor, kinds: Tensor, words: Tensor, vocabulary: Vocabulary) -> Tensor:
        """What stands in the place of hidden tokens: <mask>, another token, or the token itself.

        Args:
            tokens: [..., n] int64.
            kinds: 32-bit words [..., n], which of the three it is.
            words: 32-bit words [..., n], which token another one is.
            vocabulary: the ids' meaning.
        """
        drawn = vocabulary.specials + words % (vocabulary.size - vocabulary.specials)
        kept = torch.where(kinds < (self.mask + self.random) * WORD, drawn, tokens)
        return torch.where(kinds < self.mask * WORD, vocabulary.mask, kept)


class Hides:
    """An objective that hides tokens by its `masking`, whose rate may change on the way."""

    masking: Masking

    def at(self, progress: float) -> "Hides":
        if self.masking.first_rate is None:
            return self
        now = copy.copy(self)
        now.masking = self.masking.at(progress)
        return now


def run_lengths(words: Tensor, longest: int, geometric: float = 0.0) -> Tensor:
    """32-bit words → as many lengths n, from 1 to longest with p ∝ 1/n, or (1 - geometric)ⁿ if that is above 0."""
    weight = lambda n: (1 - geometric) ** n if geometric else 1 / n
    return 1 + pick(words, [weight(n) for n in range(1, longest + 1)])


def units_of(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    """rows [B, L] int64 → [B, L] int64: the number of the word that each token belongs to, from 0 on. A special token
    is one by itself.
    """
    text = rows >= vocabulary.specials
    begins = vocabulary.begins_word[rows] | ~text
    begins[:, 1:] |= ~text[:, :-1]
    begins[:, 0] = True
    return begins.long().cumsum(1) - 1

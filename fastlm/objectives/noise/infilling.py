"""Text infilling: spans of words become one <mask> each (Lewis et al. 2020)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.objectives.noise.draws import pick, ranked

LONGEST = 32  # words of a span: a Poisson variable of mean 3.5 is above it once in 10²⁰ draws


class Spoiled(NamedTuple):
    """What becomes of each token of a row, [B, L] bool each.

    Args:
        put_in: whether a <mask> is put in before it.
        masked: whether it becomes <mask>.
        gone: whether it goes.
    """

    put_in: Tensor
    masked: Tensor
    gone: Tensor


def infilled(text: Tensor, units: Tensor, draws: tuple[Tensor, Tensor, Tensor], rate: float, mean: float) -> Spoiled:
    """Cut spans of words whose lengths are Poisson variables out of a share of each row, rounded up.

    Lengths are drawn until they add up to the share, and the last is made shorter. A span of no word is a <mask> put in
    before a token that stays. The others begin at words drawn without replacement and may run into one another; one
    that begins inside another leaves no <mask>. All end at a special token. A row becomes no longer.

    Args:
        text: [B, L] bool, which tokens are no special ones.
        units: [B, L] int64, the number of each token's word, from 0 on.
        draws: 32-bit words [B, L] for lengths, beginnings, and where <mask> is put in.
        rate: share of the words.
        mean: of the Poisson variable.
    """
    L = text.shape[1]
    of_length, of_word, of_place = draws
    begins = text & (F.pad(units, (1, 0), value=-1).diff() > 0)
    budget = torch.ceil(rate * begins.sum(1, keepdim=True)).long()
    lengths = pick(of_length, [mean**k / math.factorial(k) for k in range(LONGEST + 1)]).expand_as(units)
    before = lengths.cumsum(1) - lengths
    drawn = before < budget
    holding, empty = drawn & (lengths > 0), drawn & (lengths == 0)
    # the k-th span that holds a word begins at the k-th word in random order
    lengths = torch.minimum(lengths, budget - before).gather(1, (~holding).byte().argsort(dim=-1, stable=True))
    place = ranked(of_word, begins)
    starts = begins & (place < holding.sum(1, keepdim=True))
    special = units.masked_fill(text, L).flip(1).cummin(1).values.flip(1)  # the next one's word
    ends = torch.where(starts, torch.minimum(units + lengths.gather(1, place), special), units)
    change = torch.zeros(len(units), L + 1, dtype=torch.int64)
    change.scatter_add_(1, units, starts.long()).scatter_add_(1, ends, -starts.long())
    covering = change.cumsum(1).gather(1, units)  # spans over each token
    gone = text & (covering > starts.long())
    stays = ~gone
    stays[:, 0] = False
    count = torch.minimum(empty.sum(1), gone.sum(1))[:, None]
    return Spoiled(stays & (ranked(of_place, stays) < count), starts & ~gone, gone)

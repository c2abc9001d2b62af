"""How rows are spoilt, by a pure function of (seed, purpose, epoch, index): one seed gives the same rows on any number
of workers, and after any interruption.

    draws.py        random words without a state, and what is drawn with them: numbers, choices
    masking.py      which tokens are hidden, and what stands in their place
    infilling.py    which spans of words become one <mask>
    sentences.py    where sentences and documents end, and in which order they come

In go rows of token ids and the `Samples` they belong to; out come rows, places and labels, a whole batch at a time. To
add a kind of noise, write a function of (rows, random words) here, and have an objective draw its words. What is drawn
with stands in this namespace; the kinds of noise are imported from their files.
"""

from fastlm.objectives.noise.draws import WORD, Purpose, Samples, choose, draw, number, pick, ranked

__all__ = [
    "WORD",
    "Purpose",
    "Samples",
    "choose",
    "draw",
    "number",
    "pick",
    "ranked",
]

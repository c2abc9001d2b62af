"""What a model is trained to do: each objective a pure function of (seed, epoch, index).

    base.py             Objective, what one defines; OBJECTIVES, name → class
    vocabulary.py       Vocabulary, the ids they know
    recipes.py          which one a preset learns, in which variant, and what its small model is trained with

    causal.py           predict each next token
    prefix.py           the same after a prefix that is seen as a whole
    masked.py           hide some tokens, and predict them from all the others
    multitask.py        hide some, and predict them from both sides, or from one
    contrastive.py      besides, tell two views of one text from those of others
    span_boundary.py    hide spans, and predict them from what is beside them too
    pairs.py            besides, tell whether two texts follow one another, or in which order
    replaced_tokens.py  have a generator replace tokens, and tell which ones
    permutation.py      predict some tokens in a random order
    spans.py            cut spans out, and have them written in order
    denoising.py        spoil a text, and have it written as it was
    mass.py             hide a fragment, and have it written

    rows.py             RowObjective, of rows that are windows of the stream
    samples/            which tokens a sample is, and in which order they come
    noise/              how rows are spoilt: random draws without a state, masks, gaps, sentences

In go a stream of token ids and sample numbers; out come batches, and sums of loss with their counts of targets. To add
one, subclass `RowObjective`, or `Objective`, with a name and define its methods, here or in your own code; the trainer
and the command line find it.
"""

from fastlm.objectives.base import IGNORED, OBJECTIVES, Batch, Objective, Shares, Terms
from fastlm.objectives.causal import Causal
from fastlm.objectives.contrastive import Contrastive
from fastlm.objectives.denoising import Denoising
from fastlm.objectives.masked import Masked
from fastlm.objectives.mass import MASS
from fastlm.objectives.multitask import MultitaskMasked
from fastlm.objectives.pairs import NextSentence, SentenceOrder
from fastlm.objectives.permutation import Permutation
from fastlm.objectives.prefix import Prefix
from fastlm.objectives.recipes import recipe, small
from fastlm.objectives.replaced_tokens import ReplacedTokens
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.span_boundary import SpanBoundary
from fastlm.objectives.spans import SpanCorruption
from fastlm.objectives.vocabulary import Vocabulary

__all__ = [
    "IGNORED", "MASS", "OBJECTIVES", "Batch", "Causal", "Contrastive", "Denoising", "Masked", "MultitaskMasked",
    "NextSentence", "Objective", "Permutation", "Prefix", "ReplacedTokens", "RowObjective", "SentenceOrder", "Shares",
    "SpanBoundary", "SpanCorruption", "Terms", "Vocabulary", "recipe", "small",
]  # fmt: skip

"""Positional schemes, one small class each; nothing else in fastlm knows their names.

    base.py          Position, what a scheme overrides; SCHEMES, name → class
    absolute.py      none, learned, sinusoidal: added to the token embeddings
    rotary.py        RoPE; frequencies.py has its scalings (PI, NTK, YaRN, Llama 3)
    bias.py          ALiBi, T5, UMT5, KERPLE: a number a head and distance, added to scores
    vectors.py       Shaw, Transformer-XL, XLNet: a vector a head and distance
    deberta.py       DeBERTa: likewise, from a table
    shared.py        what the layers of a stack share of such a scheme
    score_mods.py    FlexAttention's score_mods as schemes, and back
    rows.py          rows of a table by distance, with a gradient that does not queue on GPUs

In go a model's facts (its heads, its width) and the lengths of a call; out come O(L) rows and tables that attention's
kernels read, differentiable with respect to what the scheme learns. To add one, subclass `Position` with a name, here
or in your own code:

    class Mine(Position, name="mine"):
        def __init__(self, heads): ...
        def bias(self, distance): ...

Models, the command line, tests and benchmarks then find it in SCHEMES.
"""

from fastlm.positions.absolute import Learned, NoPosition, Sinusoidal
from fastlm.positions.base import FACTS, SCHEMES, Position, Terms, Vectors, make
from fastlm.positions.bias import ALiBi, Kerple, T5Bias, UMT5Bias, alibi_slopes, t5_bucket
from fastlm.positions.deberta import DeBERTa, deberta_bucket
from fastlm.positions.rotary import RoPE
from fastlm.positions.score_mods import from_score_mod, to_score_mod
from fastlm.positions.shared import LayerPosition, SharedPart, SharedTerms, make_shared
from fastlm.positions.vectors import RelativeSegments, Shaw, TransformerXL, XLNet

__all__ = [
    "FACTS",
    "SCHEMES",
    "ALiBi",
    "DeBERTa",
    "Kerple",
    "LayerPosition",
    "Learned",
    "NoPosition",
    "Position",
    "RelativeSegments",
    "RoPE",
    "SharedPart",
    "SharedTerms",
    "Shaw",
    "Sinusoidal",
    "T5Bias",
    "Terms",
    "TransformerXL",
    "UMT5Bias",
    "Vectors",
    "XLNet",
    "alibi_slopes",
    "deberta_bucket",
    "from_score_mod",
    "make",
    "make_shared",
    "t5_bucket",
    "to_score_mod",
]  # fmt: skip

"""What objectives know of a tokenizer."""

from typing import NamedTuple

from torch import Tensor


class Vocabulary(NamedTuple):
    """The ids that objectives know. Those below `specials` are no text: never targets, never drawn at random.

    Args:
        size: ids of the tokenizer.
        specials: how many special ids come first. Default 5.
        pad: fills rows, and starts an encoder–decoder's decoder. Default 0.
        eos: ends a document. Default 1.
        begin: stands before a pair of texts. Default 3.
        mask: stands for a token that is hidden. Default 4.
        begins_word: [size] bool, the ids whose text begins a word. Default unknown, as the next two.
        ends_sentence: [size] bool, those whose text ends a sentence where no word goes on after it.
        ends_line: [size] bool, those whose text ends a line.
    """

    size: int
    specials: int = 5
    pad: int = 0
    eos: int = 1
    begin: int = 3
    mask: int = 4
    begins_word: Tensor | None = None
    ends_sentence: Tensor | None = None
    ends_line: Tensor | None = None

    def check_knows(self, *names: str) -> None:
        """Raises ValueError if one of these fields is not given."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"the vocabulary lacks {name}, by which words and sentences are found; give it [size]")

"""Where the documents and sentences of a row end: what objectives that move or pair them have in common."""

from torch import Tensor

from fastlm.objectives.base import Vocabulary


def documents(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    """rows [B, L] int64 → [B, L] int64: the number of each token's document in its row; <eos> belongs to the one it
    ends.
    """
    ends = (rows == vocabulary.eos).long()
    return ends.cumsum(-1) - ends


def sentence_ends(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    """rows [..., L] int64 → [..., L] bool, the tokens that are a sentence's last: those that end with . ! or ? where no
    word goes on, line ends, and <eos>.
    """
    follows = vocabulary.begins_word[rows[..., 1:]] | (rows[..., 1:] < vocabulary.specials)
    ends = vocabulary.ends_sentence[rows]
    ends[..., :-1] &= follows
    return ends | vocabulary.ends_line[rows] | (rows == vocabulary.eos)


def permuted(rows: Tensor, words: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The rows [B, L] with the sentences of each document in the order that their 32-bit words [B, L] have."""
    ends = sentence_ends(rows, vocabulary).long()
    of_sentence = words.gather(1, ends.cumsum(1) - ends)
    last = (rows == vocabulary.eos).long()  # of its document, wherever the sentences go
    return rows.gather(1, (documents(rows, vocabulary) << 33 | last << 32 | of_sentence).argsort(dim=-1, stable=True))

"""Where the documents and sentences of a row end: what objectives that move or pair them have in common."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlm.objectives.vocabulary import Vocabulary


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


class Pieces(NamedTuple):
    """Runs of whole sentences of one document, two or more.

    Args:
        sentences: [P, 2] int64, the first sentence, and one past the last.
        begins, ends: [P] int64, tokens begins … ends - 1 of the stream.
        documents: [P, 2] int64, the first sentence of the document, and one past its last.
    """

    sentences: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    documents: np.ndarray


class Sentences:
    """The sentences and documents of a stream, found once.

    Args:
        tokens: [N] ids, the stream; <eos> separates documents.
        vocabulary: the ids' meaning, with its words and sentences.

    Attributes:
        begins: [S] int64, the first token of each sentence.
        documents: [D, 2] int64, the first token of each document, and one past its last, <eos> left out; those without
            a token are left out.
        of_document: [D, 2] int64, its first sentence, and one past its last.
    """

    BLOCK = 1 << 20  # tokens looked at together

    def __init__(self, tokens: np.ndarray, vocabulary: Vocabulary):
        ends, last = [], []
        for first in range(0, len(tokens), self.BLOCK):
            block = torch.from_numpy(np.asarray(tokens[first : first + self.BLOCK + 1]).astype(np.int64))
            here = slice(None, self.BLOCK)
            ends.append(first + sentence_ends(block, vocabulary)[here].nonzero().squeeze(1).numpy())
            last.append(first + (block[here] == vocabulary.eos).nonzero().squeeze(1).numpy())
        last = np.concatenate(last)
        documents = np.stack((np.append(0, last + 1), np.append(last, len(tokens))), 1)
        self.documents = documents[documents[:, 0] < documents[:, 1]]
        begins = np.union1d(np.concatenate(ends) + 1, self.documents[:, 0])
        self.begins = begins[(begins < len(tokens)) & ~np.isin(begins, last)]
        self.of_document = np.searchsorted(self.begins, self.documents)
        self._fences = np.append(self.begins, len(tokens))
        self._document = np.repeat(np.arange(len(self.documents)), np.diff(self.of_document).squeeze(1))

    def pieces(self, length: int) -> Pieces:
        """Each document cut into runs of as many sentences as fit into so many tokens. A sentence that would be alone,
        for it is too long or the last, is left out.
        """
        after = self.run(np.arange(len(self.begins)), length)
        firsts, at = [], 0
        while at < len(after):
            firsts.append(at)
            at = max(int(after[at]), at + 1)
        first = np.array(firsts, np.int64)
        first = first[after[first] - first >= 2]
        last = after[first]
        return Pieces(
            np.stack((first, last), 1),
            self.begins[first],
            self.end(first, last),
            self.of_document[self._document[first]],
        )

    def run(self, first: np.ndarray, lengths: np.ndarray | int) -> np.ndarray:
        """One past the last sentence of the longest run from each `first` on that fits into so many tokens; `first`
        where none does.
        """
        after = np.searchsorted(self._fences, self.begins[first] + lengths, "right") - 1
        return np.minimum(after, self.of_document[self._document[first], 1])

    def end(self, first: np.ndarray, after: np.ndarray) -> np.ndarray:
        """One past the last token of runs of sentences first … after - 1 of one document."""
        return np.minimum(self._fences[after], self.documents[self._document[first], 1])

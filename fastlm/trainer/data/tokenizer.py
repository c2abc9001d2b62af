"""The tokenizer: byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), so every text has ids and decodes back
exactly.

A text is trained on and encoded in pieces. The compiled tokenizer holds a hundred bytes and more for each token of what
it is given at once, and training takes time with the square of a word's length.
"""

import hashlib
import threading
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from fastlm.trainer.data.encoding import Encoder
from fastlm.trainer.signals import awake

if TYPE_CHECKING:
    from fastlm.objectives import Vocabulary

SPECIALS = ("<pad>", "<eos>", "<unk>", "<s>", "<mask>")  # ids 0, 1, 2, 3, 4
PAD, EOS, BEGIN, MASK = map(SPECIALS.index, ("<pad>", "<eos>", "<s>", "<mask>"))
LEAST = len(SPECIALS) + 256  # ids: those and the bytes
PIECE = 1024  # characters at most
BATCH = 256  # pieces encoded at once
LEARNED = 10_000_000  # bytes of a larger text that its vocabulary is learned from, at most
DISTINCT = 4_000_000  # bytes of different words in them, at most: each takes 80 bytes of memory
SPACES = " \t\n\r"
SENTENCE_ENDS = (".", "!", "?")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are part of a character


def train(documents: Iterator[str], vocab: int, path: Path, share: float = 1.0) -> None:
    """Write the tokenizer.json of at most `vocab` ids that this share of the documents makes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    given_up = threading.Event()
    texts = takewhile(lambda _: not given_up.is_set(), evenly(documents, share))
    try:
        awake(lambda: tokenizer.train_from_iterator(texts, trainer))
    finally:
        given_up.set()
    path.write_bytes(tokenizer.to_str(pretty=True).encode())


def learned_share(documents: Iterator[str], size: int) -> float:
    """The share of documents of `size` bytes in all or less that a vocabulary is learned from: LEARNED bytes, and fewer
    where their different words are more than DISTINCT bytes, as they are where few words end.
    """
    if size <= LEARNED:
        return 1.0
    share, seen = LEARNED / size, set()
    distinct = 0
    for piece in evenly(documents, share):
        for word in set(piece.split()):
            if (known := hash(word)) not in seen:
                seen.add(known)
                distinct += len(word.encode())
    return share * min(1.0, DISTINCT / max(distinct, 1))


def evenly(documents: Iterator[str], share: float) -> Iterator[str]:
    """Pieces of the documents that make up this share of their bytes, wherever one looks; of share 1, all."""
    seen = taken = 0
    for piece in chain.from_iterable(map(pieces, documents)):
        size = len(piece.encode())
        seen += size
        if taken + size <= share * seen:
            taken += size
            yield piece


def most_ids(vocab: int, size: int) -> int:
    """How many ids of `vocab` a text of `size` bytes can make: each merge leaves it shorter."""
    return min(vocab, LEAST + size)


def vocabulary(tokenizer) -> "Vocabulary":
    """What objectives know of a tokenizer. Words begin at white space and at what is neither letter nor digit;
    sentences end with . ! ? and lines.
    """
    import torch

    texts = [tokenizer.decode([i]) for i in range(len(SPECIALS), tokenizer.get_vocab_size())]
    of_text = lambda holds: torch.tensor([False] * len(SPECIALS) + [holds(text) for text in texts])
    return bare_vocabulary(tokenizer.get_vocab_size())._replace(
        begins_word=of_text(lambda text: not text[:1].isalnum() and not text.startswith(UNFINISHED)),
        ends_sentence=of_text(lambda text: text.rstrip(" \t").endswith(SENTENCE_ENDS)),
        ends_line=of_text(lambda text: text.rstrip(" \t").endswith("\n")),
    )


def bytes_of(tokenizer) -> np.ndarray:
    """[V] int64: how many bytes of text each id stands for; 0 for the special ids."""
    sizes = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]  # one character a byte
    return np.array([0] * len(SPECIALS) + sizes[len(SPECIALS) :])


def bare_vocabulary(size: int) -> "Vocabulary":
    """The same of a tokenizer of so many ids that is not there yet: each token is a word and a sentence of one line."""
    import torch

    from fastlm.objectives import Vocabulary

    each = torch.ones((), dtype=torch.bool).expand(size)  # of any size without memory
    ids = dict(specials=len(SPECIALS), pad=PAD, eos=EOS, begin=BEGIN, mask=MASK)
    return Vocabulary(size, **ids, begins_word=each, ends_sentence=each, ends_line=each)


def load_tokenizer(path: Path):
    """The tokenizer in a tokenizer.json; what looks like <eos> in a text is text to it, never the special id."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer, documents: Iterator[str], path: Path) -> tuple[int, np.ndarray]:
    """Write the ids, <eos> after each document; return (bytes of text, how often each id was written)."""
    with path.open("wb") as file:
        ids = Ids(tokenizer, file)
        for document in documents:
            ids.add(document)
        ids.flush()
    return ids.size, ids.counts


class Ids:
    """Writes the ids of documents, <eos> after each.

    Args:
        tokenizer: as `load_tokenizer` opens it, or an `Encoder` of it.
        file: to write.

    Attributes:
        documents: how many were added; size: their bytes of text.
        counts: [V] int64, how often each id was written.
        digest: SHA-256 of what was written.
    """

    def __init__(self, tokenizer, file: BinaryIO):
        self.encoder = tokenizer if isinstance(tokenizer, Encoder) else encoder_of(tokenizer)
        self.file, self.digest = file, hashlib.sha256()
        self.documents, self.size = 0, 0
        self.counts = np.zeros(self.encoder.tokenizer.get_vocab_size(), np.int64)
        self._waiting: list[tuple[str, bool]] = []

    def add(self, document: str) -> None:
        """Write one more; of it as much waits for others as is encoded at once."""
        self.documents += 1
        self.size += len(document.encode())
        for piece in _ended_pieces(document):
            self._waiting.append(piece)
            if len(self._waiting) >= BATCH:
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        ids, counts = self.encoder([piece for piece, _ in self._waiting])
        ids = np.insert(ids, np.cumsum(counts)[[is_last for _, is_last in self._waiting]], EOS)
        self._waiting = []
        self.file.write(ids)
        self.digest.update(ids)
        self.counts += np.bincount(ids, minlength=len(self.counts))


def encoder_of(tokenizer) -> Encoder:
    """What encodes by a tokenizer, in as few bits as its ids fit in."""
    return Encoder(tokenizer, bytes_of(tokenizer), dtype_of(tokenizer.get_vocab_size()))


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters. They are cut before the white space that follows a word, where
    the pre-tokenizer cuts as well, so their ids are the text's; a word longer than a piece is cut where it must be.
    """
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        cuts = (i for i in range(end, start, -1) if text[i] in SPACES and not text[i - 1].isspace())
        cut = next(cuts, end)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _ended_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Each piece, and whether it is the text's last."""
    left = len(text)
    for piece in pieces(text):
        left -= len(piece)
        yield piece, left == 0


def dtype_of(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)

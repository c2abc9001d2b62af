"""Pairs of texts: hidden tokens are predicted, and whether the second text belongs after the first."""

from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.models.heads import Factors
from fastlm.objectives import noise
from fastlm.objectives.base import (
    IGNORED,
    Batch,
    Decode,
    Objective,
    Shares,
    Terms,
    Vocabulary,
    hits,
    summed_cross_entropy,
)
from fastlm.objectives.masked import filled_in, states_at
from fastlm.objectives.noise import Samples
from fastlm.objectives.noise.masking import Hides, Masking
from fastlm.objectives.noise.sentences import Sentences
from fastlm.objectives.samples import Order


class Texts(NamedTuple):
    """Two texts of each row, tokens first … first + length - 1 of the stream: [B] int64 each."""

    first: np.ndarray
    length: np.ndarray
    second: np.ndarray
    second_length: np.ndarray


class SentencePairs(Hides, Objective):
    """Masked language modelling over pairs of texts (the term "mlm"), and a label of each pair, of the same weight.

    Each document is cut into runs of as many sentences as context - 3 tokens hold. A run of two or more is a sample,
    and falls into the texts A and B after one of its sentences, drawn anew at each visit. Texts are whole sentences,
    so that their ends tell nothing. A row is <s> A <eos> B <eos>, filled up with <pad>; A has token type 0 and B 1, and
    the label is read from the first state.

    A batch has inputs and types [B, L], lengths [B] without <pad>, places [B, n] and labels [B, n] as in `Masked`,
    round(rate · length) of them in a row, and pairs [B], the label; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`; the vocabulary with its words and sentences.
        masking: how tokens are hidden: arguments of `Masking`.

    Raises:
        ValueError: if no document has two sentences that fit into a row, or a row has no target.
    """

    kind = "encoder"
    shape: ClassVar[dict] = {"pair_labels": 2, "token_types": 2, "head": "lm", "two_streams": False}
    compared = "mlm"
    said: ClassVar[tuple[str, str]]  # what the labels 0 and 1 mean

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, **masking: object):
        super().__init__(tokens, context, vocabulary)
        vocabulary.check_knows("begins_word", "ends_sentence", "ends_line")
        self.masking, self.shares = Masking(**masking), ("accuracy", f"{self.name}_accuracy")
        self.masking.check(context)
        if context < 5:
            raise ValueError(f"rows of {context}, fewer than two tokens, <s> and two <eos>; give a larger --context")
        self.sentences = Sentences(tokens, vocabulary)
        self.pieces = self.sentences.pieces(context - 3)
        if not len(self.pieces.begins):
            raise ValueError(
                f"0 documents with two sentences that fit into {context - 3} tokens together; give other documents, a "
                "larger --context, or --objective mlm"
            )
        self.order = Order(len(self))

    def __len__(self) -> int:
        return len(self.pieces.begins)

    @property
    def windows(self) -> int:
        return len(self)

    def batch(self, seed: int, first: int, count: int) -> Batch:
        numbers, samples = self.order.drawn(seed, first, count)
        return self._make(numbers.numpy(), samples)

    def fixed(self, numbers: np.ndarray) -> Batch:
        numbers = np.asarray(numbers)
        self.check_windows(numbers)
        return self._make(numbers, Samples(0, torch.tensor(0), torch.from_numpy(numbers)))

    def _make(self, numbers: np.ndarray, samples: Samples) -> Batch:
        where, label, other = samples.draw(3, noise.Purpose.PAIR).numpy().T
        begins, ends = self.pieces.begins[numbers], self.pieces.ends[numbers]
        first, after = self.pieces.sentences[numbers].T
        split = self.sentences.begins[first + 1 + where % (after - first - 1)]
        pairs = label % 2
        texts = self._texts(Texts(begins, split - begins, split, ends - split), pairs == 1, numbers, other)
        rows, types, lengths = self._laid_out(texts)
        hidden = self.masking.hide(rows, samples, self.vocabulary, lengths)
        return hidden._asdict() | {"types": types, "lengths": lengths, "pairs": torch.from_numpy(pairs)}

    def _texts(self, texts: Texts, changed: np.ndarray, numbers: np.ndarray, words: np.ndarray) -> Texts:
        """The texts, those of label 1 changed. numbers: the pieces; words: 32 random bits a row."""
        raise NotImplementedError

    def _laid_out(self, texts: Texts) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, L], types [B, L] and lengths [B]."""
        known, place = self.vocabulary, np.arange(self.context)
        first, length, second, second_length = (x[:, None] for x in texts)
        at = np.where(place <= length, first + place - 1, second + place - length - 2)
        rows = np.asarray(self.tokens[at.clip(0, len(self.tokens) - 1)]).astype(np.int64)
        total = length + second_length + 3
        rows[np.broadcast_to(place == 0, rows.shape)] = known.begin
        rows[(place == length + 1) | (place == total - 1)] = known.eos
        rows[place >= total] = known.pad
        types = ((place > length + 1) & (place < total)).astype(np.int64)
        return torch.from_numpy(rows), torch.from_numpy(types), torch.from_numpy(total[:, 0])

    def targets(self, batch: Batch) -> dict[str, int]:
        return {"mlm": int((batch["labels"] != IGNORED).sum()), self.name: len(batch["pairs"])}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return self._terms(batch, *self._answers(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        factors, pairs = self._answers(model, batch)
        tokens = factors.logits()
        right = hits(tokens, batch["labels"]), hits(pairs, batch["pairs"])
        return self._terms(batch, tokens, pairs), dict(zip(self.shares, right, strict=True))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A pair with ‖ after each text, its hidden tokens as in `Masked`, and → what the model says of it, with what
        it is where that differs.
        """
        batch = self.any_fixed(generator)
        factors, pairs = self._answers(model, batch)
        show = lambda ids: " ‖ " if ids == [self.vocabulary.eos] else decode(ids)
        said, is_so = self.said[pairs[0].argmax().item()], self.said[batch["pairs"][0].item()]
        return f"{filled_in(batch, factors.logits(), n, show)}\n→ {said}{f' | {is_so}' * (said != is_so)}"

    def _answers(self, model: nn.Module, batch: Batch) -> tuple[Factors, Tensor]:
        """What logits [B, n, vocab_size] at the places are made of; those of the pairs, [B, 2]."""
        real = torch.arange(self.context, device=batch["lengths"].device) < batch["lengths"][:, None]
        states = model.states(batch["inputs"], attention_mask=real, token_types=batch["types"])
        return model.head.factors(states_at(states, batch["places"])), model.pair_head(states)

    def _terms(self, batch: Batch, tokens: Tensor | Factors, pairs: Tensor) -> Terms:
        return {
            "mlm": summed_cross_entropy(tokens, batch["labels"]),
            self.name: summed_cross_entropy(pairs, batch["pairs"]),
        }


class NextSentence(SentencePairs, name="nsp"):
    """BERT's objective (Devlin et al. 2019, sec. 3.1): hidden tokens, and whether B is what follows A.

    Half of the time, label 1, it is not: B is then of another document, as many sentences as fit into the tokens that A
    leaves, from one on that is drawn evenly from all; one that does not fit is cut. The text that B takes the place of
    is seen at other visits.

    Args:
        tokens, context, vocabulary, masking: as in `SentencePairs`.

    Raises:
        ValueError: as `SentencePairs`, and for fewer than two documents.
    """

    said = ("B follows A", "B is from elsewhere")

    def __init__(self, tokens: np.ndarray, context: int, vocabulary: Vocabulary, **masking: object):
        super().__init__(tokens, context, vocabulary, **masking)
        if (found := len(self.sentences.documents)) < 2:
            raise ValueError(
                f"{found} document, and half of the pairs need another one; give 2 or more, or --objective mlm"
            )

    def _texts(self, texts: Texts, changed: np.ndarray, numbers: np.ndarray, words: np.ndarray) -> Texts:
        known = self.sentences
        own, after = self.pieces.documents[numbers].T  # the document's sentences
        other = words % (len(known.begins) - (after - own))
        other = np.where(other < own, other, other + after - own)
        begin, room = known.begins[other], self.context - 3 - texts.length
        last = known.run(other, room)
        length = np.where(last > other, known.end(other, last) - begin, room)
        return texts._replace(
            second=np.where(changed, begin, texts.second), second_length=np.where(changed, length, texts.second_length)
        )


class SentenceOrder(SentencePairs, name="sop"):
    """ALBERT's objective (Lan et al. 2020, sec. 3.1): hidden tokens, and whether A and B stand in the text's order.

    Half of the time, label 1, they are swapped.

    Args:
        tokens, context, vocabulary, masking: as in `SentencePairs`.
    """

    said = ("in order", "swapped")

    def _texts(self, texts: Texts, changed: np.ndarray, numbers: np.ndarray, words: np.ndarray) -> Texts:
        return Texts(*(np.where(changed, texts[(i + 2) % 4], texts[i]) for i in range(4)))

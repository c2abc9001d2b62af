"""BART's denoising: spoil a text in one way or several, and have it written as it was."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.checks import at_least_zero, flag, one_of, share, whole
from fastlm.models.heads import Factors
from fastlm.objectives.base import Batch, Decode
from fastlm.objectives.noise import WORD, Samples, ranked
from fastlm.objectives.noise.infilling import Spoiled, infilled
from fastlm.objectives.noise.masking import units_of
from fastlm.objectives.noise.sentences import permuted
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary

WAYS = ("infill", "mask", "delete", "shuffle", "none")


class Denoising(RowObjective, name="denoising"):
    """BART's objective (Lewis et al. 2020, sec. 2.2): -Σ log p(the text | the spoiled text), in nats.

    First the sentences of each document are permuted, then tokens are spoiled, then the row is rotated to begin with
    another of its tokens. Spoiled is a share `rate` of the row, rounded up:

        infill   spans of words, whose lengths are Poisson variables, become one <mask> each (infilling.py); of 512
                 words 73.3 % are left, beside 42.8 <mask>
        mask     tokens become <mask>
        delete   tokens go, without a trace
        shuffle  all tokens of the row are permuted, whatever the rate

    Without permuted sentences, "mask" and "shuffle" are the BERT-style, MASS-style and deshuffling objectives of Raffel
    et al. 2020, table 3.

    A batch has inputs [B, context], the spoiled text and <eos>, filled up with <pad>; lengths [B], of them without
    <pad>; decoder_inputs [B, context], the labels one token later; labels [B, context], the text and <eos>; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`; the vocabulary with its words and sentences.
        spoil: "infill", "mask", "delete", "shuffle" or "none". Default "infill".
        rate: share of the row that is spoiled. Default 0.3.
        mean_span: words of a span on average. Default 3 (3.5 in the released recipe).
        random: share of the spans and masked tokens that become another token than <mask>. Default 0 (released: 0.1).
        permute: whether sentences are permuted. Default yes.
        rotate: share of the rows that are rotated. Default 0.

    Raises:
        ValueError: if the stream is too short for a single row, for a way that is unknown, and for a vocabulary without
            words and sentences.
    """

    kind = "encoder-decoder"

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        vocabulary: Vocabulary,
        spoil: Literal[WAYS] = "infill",
        rate: float = 0.3,
        mean_span: float = 3.0,
        random: float = 0.0,
        permute: bool = True,
        rotate: float = 0.0,
    ):
        one_of(WAYS, spoil=spoil)
        whole(1, context=context)
        share(rate=rate, random=random, rotate=rotate)
        at_least_zero(mean_span=mean_span)
        flag(permute=permute)
        vocabulary.check_knows("begins_word", "ends_sentence", "ends_line")
        if context < 3:
            raise ValueError(f"rows of {context}, fewer than two tokens and <eos>; give a larger --context")
        super().__init__(tokens, context, vocabulary, length=context - 1)
        self.spoil, self.rate, self.mean_span, self.random = spoil, rate, mean_span, random
        self.permute, self.rotate = permute, rotate

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        L = rows.shape[1]
        draws = samples.draw(6 * L + 2)
        sentences, *places, kinds, words, turns = draws.expand(len(rows), -1).split((L,) * 6 + (2,), -1)
        x = permuted(rows, sentences, self.vocabulary) if self.permute else rows
        x = x.gather(1, places[0].argsort(dim=-1, stable=True)) if self.spoil == "shuffle" else x
        drawn = self.vocabulary.specials + words % (self.vocabulary.size - self.vocabulary.specials)
        mask = torch.where(kinds < self.random * WORD, drawn, self.vocabulary.mask)
        x, lengths = self._rewritten(x, self._spoiled(x, *places), mask)
        x = self._rotated(x, lengths, turns)
        eos = rows.new_full((len(rows), 1), self.vocabulary.eos)
        pad = torch.full_like(eos, self.vocabulary.pad)
        labels = torch.cat((rows, eos), 1)
        return {
            "inputs": torch.cat((x, pad), 1).scatter(1, lengths[:, None], eos),
            "lengths": lengths + 1,
            "decoder_inputs": torch.cat((pad, labels[:, :-1]), 1),
            "labels": labels,
        }

    def _spoiled(self, rows: Tensor, *draws: Tensor) -> Spoiled:
        text = rows >= self.vocabulary.specials
        if self.spoil == "infill":
            return infilled(text, units_of(rows, self.vocabulary), draws, self.rate, self.mean_span)
        rate = self.rate if self.spoil in ("mask", "delete") else 0.0
        chosen = ranked(draws[0], text) < torch.ceil(rate * text.sum(1, keepdim=True))
        none = torch.zeros_like(text)
        return Spoiled(none, none, chosen) if self.spoil == "delete" else Spoiled(none, chosen, none)

    def _rewritten(self, rows: Tensor, spoiled: Spoiled, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The spoiled rows [B, L], filled up with <pad>, and their lengths [B]."""
        # before each token the <mask> that may be put in there
        slots = torch.stack((mask, torch.where(spoiled.masked, mask, rows)), -1).flatten(1)
        there = torch.stack((spoiled.put_in, ~spoiled.gone), -1).flatten(1)
        order = (~there).byte().argsort(dim=-1, stable=True)[:, : rows.shape[1]]
        return slots.masked_fill(~there, self.vocabulary.pad).gather(1, order), there.sum(1)

    def _rotated(self, rows: Tensor, lengths: Tensor, turns: Tensor) -> Tensor:
        length, place = lengths[:, None], torch.arange(rows.shape[1]).expand_as(rows)
        by = 1 + turns[:, :1] % (length - 1).clamp(min=1)
        turned = (turns[:, 1:] < self.rotate * WORD) & (place < length)
        return rows.gather(1, torch.where(turned, (place + by) % length.clamp(min=1), place))

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        return model.head.factors(model.states(batch["inputs"], batch["decoder_inputs"], attention_mask=real(batch)))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text as it is spoiled, ⟨…⟩ for <mask>, and what the model writes for it, greedily."""
        batch, eos, pad = self.any_fixed(generator), self.vocabulary.eos, self.vocabulary.pad
        written = model.generate(
            batch["inputs"], min(n, self.context), 0.0, attention_mask=real(batch), eos=eos, pad=pad, start=pad
        )  # fmt: skip
        show = lambda ids: "".join("⟨…⟩" if i == self.vocabulary.mask else decode([i]) for i in ids)
        return f"{show(batch['inputs'][0, :n].tolist())}\n→ {show(written[0].tolist())}"


def real(batch: Batch) -> Tensor:
    """[B, context] bool: which inputs are no <pad>."""
    return torch.arange(batch["inputs"].shape[1], device=batch["lengths"].device) < batch["lengths"][:, None]

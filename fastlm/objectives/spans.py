"""Span corruption: cut spans out of a text, and have them written in order."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import finite, whole
from fastlm.models.heads import Factors
from fastlm.objectives.base import Batch, Decode
from fastlm.objectives.noise import Samples
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary

SENTINELS = 100


class SpanCorruption(RowObjective, name="span-corruption"):
    """T5's objective (Raffel et al. 2020, sec. 3.1.4): -Σ log p(what was cut out | the text without it), in nats.

    A share `rate` of each row is cut out in spans of `mean_span` tokens on average. In the inputs the k-th span is one
    sentinel, id size + SENTINELS - 1 - k; the labels are each sentinel followed by its span; both end in <eos>. As in
    T5's code the first token is never cut out and the last always is. Every row of a batch has the same lengths: inputs
    of `context` tokens, made of a window of `raw` ones, see `span_lengths`.

    A batch has inputs [B, context], decoder_inputs [B, T], the labels one token later, and labels [B, T]; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        rate: share of the tokens that are cut out. Default 0.15.
        mean_span: tokens of a span on average. Default 3.

    Raises:
        ValueError: if the stream is too short for a single row, if no window makes inputs of `context` tokens, and for
            more spans than SENTINELS.
    """

    kind = "encoder-decoder"
    extra_ids = SENTINELS

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        vocabulary: Vocabulary,
        rate: float = 0.15,
        mean_span: float = 3.0,
    ):
        whole(1, context=context)
        if not (finite(rate) and 0 < rate < 1 and finite(mean_span) and mean_span >= 1):
            raise ValueError(
                f"rate is {rate!r}, mean_span {mean_span!r}; give a share between 0 and 1, and 1 or more tokens a span"
            )
        self.raw = raw_length(context, rate, mean_span)
        self.cut, self.spans, self.label_length = span_lengths(self.raw, rate, mean_span)
        if self.spans > SENTINELS:
            raise ValueError(
                f"rows of {context}, which have {self.spans} spans, and there are {SENTINELS} sentinels; "
                "give a smaller --context"
            )
        super().__init__(tokens, context, vocabulary, length=self.raw)

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        hidden, starts = self._noise(samples)
        sentinels = self.vocabulary.size + SENTINELS - starts.long().cumsum(1)
        eos = rows.new_full((len(rows), 1), self.vocabulary.eos)
        inputs = torch.where(starts, sentinels, rows)[~hidden | starts].view(len(rows), -1)
        pairs = torch.stack((sentinels, rows), -1)  # before each token the sentinel that may stand there
        labels = pairs[torch.stack((starts, hidden), -1)].view(len(rows), -1)
        labels = torch.cat((labels, eos), 1)
        start = torch.full_like(eos, self.vocabulary.pad)
        return {
            "inputs": torch.cat((inputs, eos), 1),
            "decoder_inputs": torch.cat((start, labels[:, :-1]), 1),
            "labels": labels,
        }

    def _noise(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """[B, raw] bool each: which tokens are cut out, and which of those begin a span."""
        left = self.raw - self.cut
        of_cut, of_left = samples.draw(self.raw - 2).split((self.cut - 1, left - 1), -1)
        lengths = torch.stack((_parts(of_left, self.spans), _parts(of_cut, self.spans)), -1).flatten(-2)
        ends = lengths.cumsum(-1)
        place = torch.arange(self.raw).expand(len(ends), -1).contiguous()
        run = torch.searchsorted(ends, place, right=True)  # of tokens: left, cut out, left, …
        hidden = run % 2 == 1
        return hidden, hidden & (run != F.pad(run, (1, 0), value=-1)[:, :-1])

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        return model.head.factors(model.states(batch["inputs"], batch["decoder_inputs"]))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text with ⟨k⟩ for its spans, and what the model writes for each, greedily."""
        inputs = self.any_fixed(generator)["inputs"]
        eos, pad = self.vocabulary.eos, self.vocabulary.pad
        written = model.generate(inputs, self.label_length, 0.0, eos=eos, pad=pad, start=pad)
        show = lambda ids: "".join(decode([i]) if i < self.vocabulary.size else f"⟨{self._number(i)}⟩" for i in ids)
        return f"{show(inputs[0, :n].tolist())}\n→ {show(written[0].tolist())}"

    def _number(self, sentinel: int) -> int:
        return self.vocabulary.size + SENTINELS - 1 - sentinel


def _parts(draws: Tensor, n: int) -> Tensor:
    """draws [B, items - 1] → [B, n] int64: how items fall into n parts of at least one, each way equally likely."""
    cuts = draws.argsort(dim=-1, stable=True)[:, : n - 1].sort(-1).values + 1
    items = draws.shape[-1] + 1
    return torch.diff(F.pad(F.pad(cuts, (1, 0)), (0, 1), value=items), dim=-1)


def span_lengths(raw: int, rate: float, mean_span: float) -> tuple[int, int, int]:
    """Of a row of `raw` tokens: (tokens cut out, spans, tokens of the labels with their <eos>).

    Rounding is to even, as in T5's code. The inputs have raw - cut + spans + 1 tokens.
    """
    cut = min(max(round(raw * rate), 1), raw - 1)
    spans = min(max(round(cut / mean_span), 1), raw - cut)
    return cut, spans, cut + spans + 1


def raw_length(context: int, rate: float, mean_span: float) -> int:
    """The most tokens whose inputs are at most `context` long (Raffel et al. 2020's code: 568 for 512).

    Raises:
        ValueError: if there are none.
    """
    inputs = lambda raw: raw - (lengths := span_lengths(raw, rate, mean_span))[0] + lengths[1] + 1
    raw = 2
    while inputs(raw + 1) <= context:
        raw += 1
    if inputs(raw) > context:
        raise ValueError(f"rows of {context}, fewer than a token, a sentinel and <eos>; give a larger --context")
    return raw

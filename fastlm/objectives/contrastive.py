"""Contrastive learning of sequences: two views of one text are to be closer to each other than to any other text's."""

import math
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import positive, share
from fastlm.models.heads import Factors
from fastlm.objectives.base import IGNORED, Batch, Decode, Shares, Terms, hits, summed_cross_entropy
from fastlm.objectives.masked import factors_at, filled_in, states_at
from fastlm.objectives.noise import Purpose, Samples
from fastlm.objectives.noise.masking import Hides, Masking
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary


class Contrastive(Hides, RowObjective, name="contrastive"):
    """Masked language modelling, and sequence contrastive learning (Meng et al. 2021, COCO-LM, sec. 3.2).

    A row is <s> text. The model sees it twice: with tokens hidden, which it predicts (the term "mlm"), and as a crop,
    <s> and a stretch of its text as it was, at an even place. Let sᵢ be the first states of both, scaled to length 1:

        loss = -Σᵢ log exp(sᵢ · s₍ᵢ₎ / t) / Σⱼ exp(sᵢ · sⱼ / t)        j ≠ i; (i): the other view of i's text

    (the term "contrastive"; InfoNCE, van den Oord et al. 2018). The others j are those of the same micro-batch, on all
    ranks of a run: unlike other losses, this one depends on how an update is cut into micro-batches.

    A batch has inputs [B, L], places [B, n] and labels [B, n] as in `Masked`, and crops [B, C]; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        crop: share of the text that a crop has. Default 0.9.
        temperature: t. Default 0.1 (Chen et al. 2020, SimCLR, table 5).
        masking: how tokens are hidden: arguments of `Masking`, such as rate (default 0.15).

    Raises:
        ValueError: if the stream is too short for a single row, a row for a single target, or a crop for a token.
    """

    kind = "encoder"
    shape: ClassVar[dict] = {"pair_labels": 0, "head": "lm", "two_streams": False}
    compared = "mlm"
    shares = ("accuracy", "contrastive_accuracy")

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        vocabulary: Vocabulary,
        crop: float = 0.9,
        temperature: float = 0.1,
        **masking: object,
    ):
        super().__init__(tokens, context, vocabulary, length=max(1, context - 1))
        share(crop=crop)
        positive(temperature=temperature)
        self.temperature, self.masking = temperature, Masking(**masking)
        self.masking.check(context)
        if self.masking.whole_words:
            vocabulary.check_knows("begins_word")
        self.cropped = round(crop * (context - 1))
        if self.cropped < 1:
            raise ValueError(f"a crop of {crop:g} of {context - 1} tokens is none; give a larger crop or --context")

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        begin = torch.full_like(rows[:, :1], self.vocabulary.begin)
        first = samples.draw(1, Purpose.CROP) % (rows.shape[1] - self.cropped + 1)
        crops = rows.gather(1, first + torch.arange(self.cropped).expand(len(rows), -1))
        hidden = self.masking.hide(torch.cat((begin, rows), 1), samples, self.vocabulary)
        return hidden._asdict() | {"crops": torch.cat((begin, crops), 1)}

    def targets(self, batch: Batch) -> dict[str, int]:
        return {"mlm": int((batch["labels"] != IGNORED).sum()), "contrastive": 2 * len(batch["inputs"])}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return self._terms(batch, *self._answers(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        factors, views, partners = self._answers(model, batch)
        tokens = factors.logits()
        right = hits(tokens, batch["labels"]), hits(views, partners)
        return self._terms(batch, tokens, views, partners), dict(zip(self.shares, right, strict=True))

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text as in `Masked`."""
        batch = self.any_fixed(generator)
        return filled_in(batch, factors_at(model, batch).logits(), n, decode)

    def _answers(self, model: nn.Module, batch: Batch) -> tuple[Factors, Tensor, Tensor]:
        """What logits [B, n, vocab_size] at the places are made of; and what `similarities` gives."""
        states = model.states(batch["inputs"])
        views = torch.cat((states[:, 0], model.states(batch["crops"])[:, 0]))
        return model.head.factors(states_at(states, batch["places"])), *similarities(views, self.temperature)

    def _terms(self, batch: Batch, tokens: Tensor | Factors, views: Tensor, partners: Tensor) -> Terms:
        return {
            "mlm": summed_cross_entropy(tokens, batch["labels"]),
            "contrastive": summed_cross_entropy(views, partners),
        }


def similarities(views: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """How much each view of a text is like every view on any rank.

    Args:
        views: [2B, dim], the first views of B texts, then their second views in the same order.
        temperature: what similarities are divided by.

    Returns:
        (logits [2B, views of all ranks] fp32, cosines over the temperature, -∞ for a view and itself; [2B] int64, the
        column of each text's other view). Gradients reach the views of every rank, where all ranks call backward.
    """
    views = F.normalize(views.float(), dim=-1)
    everyone, before = over_ranks(views)
    own = before + torch.arange(len(views), device=views.device)
    logits = (views @ everyone.mT / temperature).scatter(1, own[:, None], -math.inf)
    return logits, own.roll(len(views) // 2)


def over_ranks(x: Tensor) -> tuple[Tensor, int]:
    """(The rows of all ranks' x [n, D], in their order; how many are of ranks before this one), with gradients."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x, 0
    lengths = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor(len(x), device=x.device))
    counts = torch.stack(lengths).tolist()  # they may differ by a row
    return _Gather.apply(x, counts), sum(counts[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """x of all ranks, which have so many rows each. The gradient of a rank's x is summed over all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = F.pad(x, (0, 0, 0, max(counts) - len(x)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None

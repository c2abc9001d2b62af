"""Replaced-token detection: a generator fills in hidden tokens, and a discriminator tells which ones it changed."""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import Electra, ModelConfig, Transformer
from fastlm.models.electra import generator_config
from fastlm.models.heads import Factors
from fastlm.objectives.base import IGNORED, Batch, Decode, Shares, Terms, hits, summed_cross_entropy
from fastlm.objectives.masked import factors_at
from fastlm.objectives.noise import Purpose, Samples, choose
from fastlm.objectives.noise.masking import Masking
from fastlm.objectives.rows import RowObjective
from fastlm.objectives.vocabulary import Vocabulary


class ReplacedTokens(RowObjective, name="replaced-tokens"):
    """ELECTRA's objective (Clark et al. 2020), and that of DeBERTa v3 (He et al. 2023).

    Of the hidden tokens a share `mask` become <mask>, and the others stay. A generator learns all of them (the term
    "mlm"), and in each place a token is drawn from what it says. The discriminator is given the text with these, and
    learns of every token that is no padding whether it is another than the text's ("detection", times `weight`, binary
    cross entropy). No gradient passes the draw. No special token is drawn, so the discriminator never meets <mask>;
    ELECTRA's code leaves that to chance, and draws places with replacement, which ours are not.

    A batch has inputs [B, L], places [B, n] and labels [B, n] as in `Masked`, tokens [B, L], the text, and draws
    [B, n], a 32-bit word for each token that is put in; all int64.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        rate: share of the tokens that are hidden. Default 0.15 (ELECTRA-large: 0.25).
        mask: share of those that become <mask>. Default 0.85 (DeBERTa v3: all).
        weight: of detection in the loss. Default 50.
        temperature: the generator's logits are divided by it before the draw. Default 1.
        disallow_equal: whether the token that was there is never drawn. Default no.
        uniform: whether tokens are drawn evenly, without a generator and the term "mlm". Default no.
        sharing: of embeddings, as in `Electra`. Default "shared".
        generator: arguments of `generator_config`, such as width and depth. Default none.

    Raises:
        ValueError: if the stream is too short for a single row, or a row for a single target.
    """

    kind = "encoder"
    shape: ClassVar[dict] = {"pair_labels": 0, "head": "detection", "mask_decoder": False, "two_streams": False}

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        vocabulary: Vocabulary,
        rate: float = 0.15,
        mask: float = 0.85,
        weight: float = 50.0,
        temperature: float = 1.0,
        disallow_equal: bool = False,
        uniform: bool = False,
        sharing: str = "shared",
        generator: dict | None = None,
    ):
        super().__init__(tokens, context, vocabulary)
        self.masking = Masking(rate, mask, random=0.0)
        self.masking.check(context)
        self.temperature, self.disallow_equal, self.uniform = temperature, disallow_equal, uniform
        self.sharing, self.generator = sharing, generator or {}
        self.weights = {"detection": weight}
        self.compared = "detection" if uniform else "mlm"
        self.shares = (*(() if uniform else ("accuracy",)), "replaced", "precision", "recall")

    def model(self, config: ModelConfig) -> nn.Module:
        if self.uniform:
            return Transformer(config)
        return Electra(generator_config(config, **self.generator), config, self.sharing)

    def exported(self, model: nn.Module) -> Transformer:
        """The discriminator."""
        return model if self.uniform else model.exported()

    def make(self, rows: Tensor, samples: Samples) -> Batch:
        hidden = self.masking.hide(rows, samples, self.vocabulary)
        draws = samples.draw(hidden.places.shape[1], Purpose.GENERATOR).expand_as(hidden.places)
        return hidden._asdict() | {"tokens": rows, "draws": draws}

    def targets(self, batch: Batch) -> dict[str, int]:
        detection = {"detection": int((batch["tokens"] != self.vocabulary.pad).sum())}
        return detection if self.uniform else {"mlm": int((batch["labels"] != IGNORED).sum())} | detection

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return self._terms(batch, *self._answers(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        factors, seen, found = self._answers(model, batch)
        guessed = None if factors is None else factors.logits()
        real = batch["tokens"] != self.vocabulary.pad
        said, replaced = (found > 0) & real, seen != batch["tokens"]
        right = (said & replaced).sum()
        shares = {"replaced": (replaced.sum(), real.sum())}  # what precision and recall are compared with
        shares |= {"precision": (right, said.sum()), "recall": (right, replaced.sum())}
        if guessed is not None:
            shares["accuracy"] = hits(guessed, batch["labels"])
        return self._terms(batch, guessed, seen, found), shares

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """What the discriminator is given of a row: [a token] that it takes for replaced, and ⟨one⟩ that it does not
        though it was; after | what was there.
        """
        batch = self.any_fixed(generator)
        _, seen, found = self._answers(model, batch)
        shown = []
        for token, was, logit in zip(seen[0].tolist(), batch["tokens"][0].tolist(), found[0].tolist(), strict=True):
            text = decode([token]) if token == was else f"{decode([token])}|{decode([was])}"
            shown.append(f"[{text}]" if logit > 0 else f"⟨{text}⟩" if token != was else text)
        return "".join(shown[:n])

    def _answers(self, model: nn.Module, batch: Batch) -> tuple[Factors | None, Tensor, Tensor]:
        """What the generator's logits [B, n, V] are made of, or None; what the discriminator is given, [B, L]; its
        logits [B, L].
        """
        if self.uniform:
            seen = self._put_in(batch, batch["labels"].new_zeros((), dtype=torch.float32))
            return None, seen, model(seen)
        guessed = factors_at(model.generator, batch)
        with torch.no_grad():
            seen = self._put_in(batch, guessed.logits().float() / self.temperature)
        return guessed, seen, model.discriminator(seen)

    def _put_in(self, batch: Batch, logits: Tensor) -> Tensor:
        """The text with a token drawn by logits [B, n, V] at each place that has a target."""
        labels = batch["labels"]
        logits = logits.expand(*labels.shape, self.vocabulary.size).clone()
        logits[..., : self.vocabulary.specials] = -torch.inf
        if self.disallow_equal:
            logits.scatter_(-1, labels.clamp(min=0)[..., None], -torch.inf)
        there = batch["tokens"].gather(1, batch["places"])
        drawn = torch.where(labels == IGNORED, there, choose(logits, batch["draws"]))
        return batch["tokens"].scatter(1, batch["places"], drawn)

    def _terms(self, batch: Batch, guessed: Tensor | Factors | None, seen: Tensor, found: Tensor) -> Terms:
        replaced = (seen != batch["tokens"]).float()
        real = (batch["tokens"] != self.vocabulary.pad).float()
        terms = {"detection": F.binary_cross_entropy_with_logits(found.float(), replaced, real, reduction="sum")}
        return terms if guessed is None else {"mlm": summed_cross_entropy(guessed, batch["labels"])} | terms

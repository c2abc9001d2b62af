"""Masked language modelling: hide some tokens, and predict them from all the others."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.objectives import noise
from fastlm.objectives.base import IGNORED, Batch, Decode, Objective, Vocabulary
from fastlm.objectives.windows import Windows

WORD = 2**32  # draws are below


class Masked(Objective, name="mlm"):
    """Predict the tokens that were hidden (Devlin et al. 2019): -Σ log p(xᵢ | the corrupted row), in nats.

    In every row round(rate · context) places are drawn without replacement, the same number in each; 80 % of them
    become <mask>, 10 % another token, and 10 % stay. A place is never a special token, nor is what replaces one. Noise
    is drawn anew at each visit (dynamic masking, Liu et al. 2019) unless `rounds` says otherwise. Rows are windows that
    may cross documents, with <eos> between them (Liu et al. 2019, FULL-SENTENCES).

    A batch has inputs [B, L], places [B, n], where targets are, and labels [B, n], the tokens that were there, or
    IGNORED where a row has fewer; all int64. The head reads the states at these places alone.

    Args:
        tokens, context, vocabulary: as in `Objective`.
        rate: share of the places that are targets. Default 0.15.
        rounds: how many different noises a row has, taken in turn: 1 is static masking, 10 BERT's ten copies of the
            data. None: a new one each time.

    Raises:
        ValueError: if the stream is too short for a single row, or a row for a single target.
    """

    kind = "encoder"
    shape = {"pair_labels": 0}  # noqa: RUF012

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        vocabulary: Vocabulary,
        rate: float = 0.15,
        rounds: int | None = None,
    ):
        super().__init__(tokens, context, vocabulary)
        self._windows, self.rounds = Windows(tokens, context), rounds
        self.count = round(rate * context)
        if self.count < 1:
            raise ValueError(f"rows of {context}, of which {rate:g} are not one target; give a larger --context")

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def windows(self) -> int:
        return self._windows.count

    def batch(self, seed: int, first: int, count: int) -> Batch:
        rows, epochs, indices = self._windows.drawn(seed, first, count)
        return self.hide(rows, seed, epochs if self.rounds is None else epochs % self.rounds, indices)

    def fixed(self, numbers: np.ndarray) -> Batch:
        return self.hide(self._windows.fixed(numbers), 0, torch.tensor(0), torch.from_numpy(np.asarray(numbers)))

    def hide(self, rows: Tensor, seed: int, epochs: Tensor, indices: Tensor) -> Batch:
        """The batch of rows [B, L], whose noise is that of (seed, epoch, index)."""
        L, n = self.context, self.count
        draws = noise.draw(seed, noise.Purpose.NOISE, epochs, indices, L + 2 * n)
        order, kinds, words = draws.split((L, n, n), -1)
        text = rows >= self.vocabulary.specials
        places = order.masked_fill(~text, WORD).argsort(dim=-1, stable=True)[:, :n]
        hidden, is_text = rows.gather(1, places), text.gather(1, places)
        drawn = self.vocabulary.specials + words % (self.vocabulary.size - self.vocabulary.specials)
        new = torch.where(kinds < 0.8 * WORD, self.vocabulary.mask, torch.where(kinds < 0.9 * WORD, drawn, hidden))
        inputs = rows.scatter(1, places, torch.where(is_text, new, hidden))
        return {"inputs": inputs, "places": places, "labels": hidden.masked_fill(~is_text, IGNORED)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits, labels = self._logits(model, batch), batch["labels"].flatten()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")}

    def sample(self, model: nn.Module, n: int, generator: torch.Generator, decode: Decode) -> str:
        """A row of the text, a hidden token as [the likeliest], or [the likeliest|what was there] where they differ."""
        number = torch.randint(self.windows, (), generator=generator, device=generator.device).item()
        batch = {name: x.to(generator.device) for name, x in self.fixed(np.array([number])).items()}
        guesses = self._logits(model, batch)[0].argmax(-1).tolist()
        row = [[i] for i in batch["inputs"][0].tolist()]
        shown = {}
        for place, guess, label in zip(batch["places"][0].tolist(), guesses, batch["labels"][0].tolist(), strict=True):
            if label != IGNORED:
                was = "" if guess == label else f"|{decode([label])}"
                shown[place] = f"[{decode([guess])}{was}]"
        return "".join(shown.get(place) or decode(ids) for place, ids in enumerate(row[:n]))

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, n, vocab_size] fp32, at the places."""
        states = model.states(batch["inputs"])
        places = batch["places"][:, :, None].expand(-1, -1, states.shape[-1])
        return model.head(states.gather(1, places)).float()

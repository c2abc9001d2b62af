"""Text-to-text: which text answers a text (Raffel et al. 2020), by an encoder–decoder or by a decoder."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastlm.models import ModelConfig
from fastlm.models.heads import Factors
from fastlm.objectives import IGNORED, Batch, Shares, Terms
from fastlm.objectives.base import summed_cross_entropy
from fastlm.trainer.tasks.layout import Ids, Layout
from fastlm.trainer.tasks.rows import Row
from fastlm.trainer.tasks.task import Baseline, Example, Head, Task

WRITTEN = 64  # ids of an answer that is shown, at most


class TextToText(Task, name="text-to-text"):
    """Write the target: -Σ log p(xᵢ | x<ᵢ, source) over its ids and <eos>, in nats.

    An encoder–decoder reads source <eos> and writes target <eos>; a decoder goes on after source <eos>. A batch has
    inputs, real and types as in `Layout.batch`, of the source or of both; labels [B, T] int64, IGNORED in the source
    and in padding; and decoder_inputs [B, T] int64 beside an encoder.

    Args:
        examples, context, vocabulary, shape, head: as in `Task`.
    """

    per = "token"
    shares = ("exact_match",)
    bare = False

    @classmethod
    def shape_of(cls, shape: ModelConfig) -> dict:
        return {"head": "lm"} if shape.head == "none" else {}

    @staticmethod
    def encode(row: Row, layout: Layout, head: Head, encoding: Callable) -> Example:
        source, target = encoding(row.first)[0], encoding(row.answer)[0]
        if layout.apart:
            made, kept = layout.row(source, None), target[: layout.context - 1]
            made = made._replace(cut=made.cut + len(target) - len(kept))
        else:
            made = layout.row(source, target)
            kept = made.ids[made.second : -1]
        # one that is cut has no end
        labels = [*kept, layout.eos if len(kept) == len(target) else IGNORED]
        return Example(made, labels, row)

    @staticmethod
    def baseline(train: Sequence[Example], held_out: Sequence[Example], head: Head) -> Baseline:
        ids = lambda examples: [i for example in examples for i in example.target if i != IGNORED]
        counts, wanted = Counter(ids(train)), ids(held_out)
        total = sum(counts.values()) + len({*counts, *wanted})  # plus one each
        loss = -sum(math.log((counts[i] + 1) / total) for i in wanted) / max(1, len(wanted))
        ((most, _),) = Counter(example.said.answer for example in train).most_common(1)
        share = sum(example.said.answer == most for example in held_out) / len(held_out)
        return Baseline("token frequencies", loss, "exact_match", share, f"always {most[:40]!r}")

    def make(self, examples: list[Example]) -> Batch:
        batch = self.layout.batch([e.row for e in examples])
        if self.layout.apart:
            labels = torch.full((len(examples), max(len(e.target) for e in examples)), IGNORED)
            for i, example in enumerate(examples):
                labels[i, : len(example.target)] = torch.tensor(example.target)
            shifted = labels.masked_fill(labels == IGNORED, self.vocabulary.pad)[:, :-1]
            start = torch.full_like(labels[:, :1], self.vocabulary.pad)
            return batch | {"labels": labels, "decoder_inputs": torch.cat((start, shifted), 1)}
        labels = torch.full_like(batch["inputs"], IGNORED)
        for i, (row, target, *_) in enumerate(examples):
            labels[i, row.second - 1 : row.second - 1 + len(target)] = torch.tensor(target)
        return batch | {"labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        return {"loss": summed_cross_entropy(self._factors(model, batch), batch["labels"])}

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Terms, Shares]:
        """Besides the loss, the share of targets that greedy decoding writes exactly. It writes the target if, and only
        if, each of its tokens is the likeliest after those before it, so nothing has to be written to know.
        """
        logits, labels = self._factors(model, batch).logits(), batch["labels"]
        right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
        whole = (labels == self.vocabulary.eos).any(1)
        n = torch.full_like(labels[:, 0], 1).sum()
        return {"loss": summed_cross_entropy(logits, labels)}, {"exact_match": ((right & whole).sum(), n)}

    def answers(self, model: nn.Module, batch: Batch, examples: list[Example], decode: Callable) -> list[str]:
        """What greedy decoding writes."""
        sources = self.layout.batch([Ids(e.row.ids[: e.row.second], e.row.second) for e in examples])
        inputs, real = (sources[name].to(batch["inputs"].device) for name in ("inputs", "real"))
        eos, pad = self.vocabulary.eos, self.vocabulary.pad
        written = model.generate(inputs, WRITTEN, 0.0, attention_mask=real, eos=eos, pad=pad, start=pad)
        new = written if self.both else written[:, inputs.shape[1] :]
        return [decode([i for i in ids if i not in (eos, pad)]) for ids in new.tolist()]

    def shown(self, example: Example, said: str, n: int, decode: Callable) -> str:
        source = example.row._replace(ids=example.row.ids[: example.row.second])
        return super().shown(example._replace(row=source), said, n, decode)

    def _factors(self, model: nn.Module, batch: Batch) -> Factors:
        if self.layout.apart:
            states = model.states(batch["inputs"], batch["decoder_inputs"], attention_mask=batch["real"])
        else:
            states = model.states(batch["inputs"])
        return model.head.factors(states)

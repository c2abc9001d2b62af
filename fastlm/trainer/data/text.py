"""A text that is learned: a corpus and its tokens, and what a loss on it is compared with."""

import math
from dataclasses import dataclass

from fastlm.objectives import Objective
from fastlm.trainer.data.corpus import Corpus
from fastlm.trainer.data.shards.packed import Packed
from fastlm.trainer.data.tokens import Tokens
from fastlm.trainer.words import several


@dataclass(frozen=True)
class Text:
    """The `Material` of pretraining."""

    corpus: Corpus | Packed
    sides: Tokens

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def epochs(self, rows: int, context: int) -> float:
        return rows * context / len(self.sides.train)

    def references(self) -> dict[str, float]:
        """Nats per held-out token: guessing evenly, guessing by frequency, and zlib -9 on each document by itself."""
        facts = self.sides.facts
        return {
            "ln V": math.log(facts.vocab_size),
            "unigram": facts.unigram_nats,
            "zlib -9": self.sides.nats_per_token(facts.zlib_bits),
        }

    def to_beat(self) -> tuple[str, ...]:
        bits = self.sides.bits_per_byte
        return tuple(f"{name} {nats:.2f} nats ({bits(nats):.3f} bits/byte)" for name, nats in self.references().items())

    def beside(self) -> str:
        return f"zlib -9 {self.sides.facts.zlib_bits:.3f} bits/byte"

    def result(self) -> dict[str, str]:
        facts = self.sides.facts
        return {
            "zlib -9, each held-out document by itself": f"{facts.zlib_bits:.4f} bits per byte",
            "unigram": f"{facts.unigram_nats:.4f} nats per token",
            "ln V": f"{math.log(facts.vocab_size):.4f} nats per token",
        }

    def described(self) -> dict[str, str | None]:
        corpus, tokens = self.corpus, self.sides
        return {
            "text": f"{corpus.name}, {several(len(corpus.sources), 'file')}, {corpus.bytes:,} bytes",
            "skipped": "; ".join(corpus.skipped.lines()) or None,
            "SHA-256": corpus.fingerprint,
            "split": corpus.split,
            "tokens": f"{len(tokens.train):,} to train on, {len(tokens.held_out):,} held out",
            "held out": f"{tokens.held_out_share:.1%} of the text",
        }

    def failure(self, objective: Objective, last: dict) -> tuple[str, str] | None:
        loss, unigram = last[f"held_out_{objective.compared}"], self.sides.facts.unigram_nats
        if loss < unigram:
            return None
        verdict = f"the held-out loss {loss:.3f} is not below the unigram line {unigram:.3f}"
        return verdict, "the model learned nothing from context; try another --lr, or more --minutes"

"""A text as it is, with what pages of the web have around theirs, and with that taken out by rules."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
from tokenizers import Tokenizer

from fastlm.trainer.data.cleaning import passes
from fastlm.trainer.data.files import Skipped, read_rows
from fastlm.trainer.data.shards.sources import Part, Piece
from fastlm.trainer.data.shards.work import Work
from fastlm.trainer.data.tokenizer import EOS, load_tokenizer
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import clearly_below, draw_curves, draw_dots, losses_of, of_seeds, spread

STEPS = 300
TEXT = 300_000  # tokens of the text that pages are made of, more than the updates read
PAGE = 20  # lines
AGAIN = 4  # one of so many pages stands twice
ABOVE = (
    "Home, news, products, support and contact: all of it is in the menu at the left.",
    "You are here because somebody has sent you here, or because you have searched for it.",
    "Sign up for our letter today, and never miss one of our offers again.",
    "Log in to write a comment, to vote for this page, or to keep it for later.",
)
BELOW = (
    "Share this page with your friends, and tell them what you think of it.",
    "Other readers of this page have read these pages too, and were happy with them.",
    "Please enable JavaScript in your browser to see all that this page has to show.",
    "This site uses cookies so that you have the best of all experiences here.",
    "Whoever reads on agrees to our terms of use and to our privacy policy.",
    "All rights reserved, all prices without taxes, all dates without a promise.",
)
# of prose, whose lines end with a full stop and whose braces are code
PROSE = ("braces", "punctuation", "sentences", "words")
RULES = passes.Cleaning("text", PROSE, frozenset(), None, (), None, 0.0)


class CleanText(Experiment, name="clean-text"):
    of = "Raffel et al. 2020, sec. 2.2 and table 8: C4 cleaned by its rules, and not"
    limits = (
        "The noise is made, always the same lines and pages that stand twice, which the rules know; that of the web is "
        "of more kinds. C4 without rules is also larger, where updates are equal here: noise costs what is read of it, "
        "for it is soon known by heart. Of Python's sources the rules of prose are left out, and indentation, which "
        "the rules take away, is taken from all texts before."
    )

    def run(self, setting: Setting) -> Finding:
        tokenizer = load_tokenizer(setting.tokens.tokenizer_file)
        pages = [page for document in lines_of(setting.tokens.train[:TEXT], tokenizer) for page in cut(document)]
        texts = {"clean": pages, "noisy": spoilt(pages)}
        texts["noisy, cleaned"] = cleaned(texts["noisy"])
        held_out = encoded(map("\n".join, lines_of(setting.tokens.held_out[:TEXT], tokenizer)), tokenizer)
        sides = {
            name: replace(setting.tokens, train=encoded(text, tokenizer), held_out=held_out)
            for name, text in texts.items()
        }
        runs = {
            name: of_seeds(setting._replace(tokens=tokens), setting.steps(STEPS), name)
            for name, tokens in sides.items()
        }  # fmt: skip
        found = {name: losses_of(several) for name, several in runs.items()}
        rows = [
            (name, f"{len(texts[name]):,}", f"{len(sides[name].train):,}", spread(losses))
            for name, losses in found.items()
        ]
        clean, noisy, again = found.values()
        cost, left = mean(noisy) - mean(clean), mean(again) - mean(clean)
        claims = [
            Claim("Every seed of clean text ends below every seed of noisy text.", clearly_below(clean, noisy)),
            Claim("So does every seed of noisy text that the rules have cleaned.", clearly_below(again, noisy)),
            Claim(
                f"Of the {cost:.3f} nats that noise costs, the rules leave half or less, in the mean ({left:.3f}).",
                cost > 0 and left <= cost / 2,
            ),
        ]

        def draw(figure) -> None:
            left, right = figure.subplots(1, 2)
            draw_curves(left, runs, "training loss, nats per token")
            draw_dots(right, found, "held-out clean text, nats per token")

        columns = ("text", "pages", "tokens", "held-out clean text, nats per token")
        return Finding(columns, rows, claims, draw, {"losses": found, "texts": texts})


def lines_of(ids: np.ndarray, tokenizer: Tokenizer) -> list[list[str]]:
    """The lines of each document that are not empty, without the space around them."""
    documents = (tokenizer.decode(some.tolist()) for some in np.split(ids, np.flatnonzero(ids == EOS)))
    return [lines for text in documents if (lines := [*filter(None, map(str.strip, text.splitlines()))])]


def cut(lines: Sequence[str]) -> list[str]:
    """Pages of a document."""
    return ["\n".join(lines[first : first + PAGE]) for first in range(0, len(lines), PAGE)]


def spoilt(pages: Sequence[str]) -> list[str]:
    """Each page with the lines above and below it, and some of them twice."""
    framed = ["\n".join((*ABOVE, page, *BELOW)) for page in pages]
    return [page for i, page in enumerate(framed) for page in [page] * (2 if i % AGAIN == 0 else 1)]


def cleaned(pages: Sequence[str]) -> list[str]:
    """What `fastlm data clean` leaves of pages, by all rules but those of PROSE."""
    with TemporaryDirectory() as folder:
        path, work = Path(folder, "pages.jsonl"), Work(Path(folder, "out"), "report.json")
        path.write_text("".join(f"{json.dumps({'text': page})}\n" for page in pages), encoding="utf-8")
        part = Part("pages", 0, (Piece(path, path.name),))
        passes.judge(work, part, RULES)
        passes.find_repeats(work, [part])
        passes.keep(work, part, RULES)
        return [row["text"] for _, row in read_rows(work.out / "pages" / "00000.jsonl", Skipped().add)]


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Their ids, <eos> after each."""
    return np.concatenate([[*tokenizer.encode(text, add_special_tokens=False).ids, EOS] for text in texts])

"""C4's rules for web pages (Raffel et al. 2020, "Exploring the limits of transfer learning", sec. 2.2).

A rule of lines takes lines or parts of lines away, a rule of documents whole documents. RULES has what each says in a
report.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

WORDS = 5  # of a line, at least
SENTENCES = 3  # of a document, at least
ENDS = (".", "!", "?", '"', "”", "’")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
SENTENCE = re.compile(r"[.!?\n](?:(?<=\n)\n*|(?<!\n)[\"'”’)\]]*\s+)")  # what ends one
OF_LINES = {
    "citations": "a mark as Wikipedia's [1], [edit] or [citation needed], taken out of a line",
    "punctuation": f"a line that ends with none of {' '.join(ENDS[:4])}",
    "words": f"a line of fewer than {WORDS} words",
    "javascript": "a line with the word JavaScript",
    "policy": "a line about terms of use, privacy or cookies",
}
OF_DOCUMENTS = {
    "lorem": "a document with lorem ipsum",
    "braces": "a document with { , which is code",
    "vulgar": "a document with a word of --bad-words",
    "sentences": f"a document of fewer than {SENTENCES} sentences, when its other lines are gone",
}
RULES = OF_LINES | OF_DOCUMENTS


@dataclass(frozen=True)
class Rules:
    """without: names of RULES that are left out. bad_words: in lower case; of none, no document is vulgar."""

    without: Collection[str] = ()
    bad_words: frozenset[str] = frozenset()

    def applied(self, document: str, dropped: Counter[str]) -> tuple[str, str | None]:
        """What is left of a document, and the rule that it falls under as a whole, or None. dropped: lines are counted
        there by the rule that they fell under.
        """
        low = document.lower()
        for name, holds in (("lorem", "lorem ipsum" in low), ("braces", "{" in document)):
            if holds and name not in self.without:
                return document, name
        if self.bad_words and "vulgar" not in self.without and self.bad_words.intersection(re.findall(r"\w+", low)):
            return document, "vulgar"
        text = "\n".join(self._lines(document, self._of_lines(document, low), dropped))
        return text, "sentences" if self.too_short(text) else None

    def too_short(self, text: str) -> bool:
        """Whether a text has too few sentences, or nothing at all."""
        text = text.strip()
        if "sentences" in self.without:
            return not text
        return len(list(islice(SENTENCE.finditer(text), SENTENCES - 1))) < SENTENCES - 1

    def _of_lines(self, document: str, low: str) -> set[str]:
        """The rules that some line of the document can fall under. low: it in lower case."""
        on = set(OF_LINES).difference(self.without)
        if "[" in document:  # a word may stand around a mark that is taken out
            return on
        there = {"javascript": "javascript" in low, "policy": any(words in low for words in POLICY), "citations": False}
        return {name for name in on if there.get(name, True)}

    def _lines(self, document: str, on: Collection[str], dropped: Counter[str]) -> Iterator[str]:
        for line in document.split("\n"):
            line = line.strip()
            if not line:
                continue
            if "citations" in on and "[" in line:
                line, found = CITATION.subn("", line)
                dropped["citations"] += found
            rule = _fault(line, on)
            if rule is None:
                yield line
            else:
                dropped[rule] += 1


def _fault(line: str, on: Collection[str]) -> str | None:
    if "punctuation" in on and (not line.endswith(ENDS) or line.endswith("...")):
        return "punctuation"
    if "words" in on and len(line.split(None, WORDS - 1)) < WORDS:
        return "words"
    if "javascript" in on and "javascript" in line.lower():
        return "javascript"
    return "policy" if "policy" in on and any(words in line.lower() for words in POLICY) else None


def sentences(text: str) -> list[str]:
    """The sentences of a text with the white space after each, which together are the text."""
    cuts = [0, *(found.end() for found in SENTENCE.finditer(text)), len(text)]
    return [text[begin:end] for begin, end in pairwise(cuts) if begin < end]

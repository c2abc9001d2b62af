"""`fastlm reproduce`: tables and figures of papers, at a small size."""

import time
from collections.abc import Callable

import torch

from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import Tokens, tokenize
from fastlm.trainer.options.reproduce import Reproduce
from fastlm.trainer.reproduce import EXPERIMENTS, Experiment, Finding, Setting, report
from fastlm.trainer.words import Refusal, clock, disk_words, several

VOCAB = 320  # few ids, so that a few hundred updates learn more than how frequent each is


def reproduce(asked: Reproduce, say: Callable[..., None]) -> dict[Experiment, Finding]:
    """Run an experiment, or all of them, and write what they found.

    Args:
        asked: the command's flags.
        say: called with a label and its parts for each line that is shown.

    Returns:
        What each found.

    Raises:
        Refusal: naming the folder, if it cannot be written to.
    """
    torch.set_num_threads(asked.threads)
    setting = Setting(_tokens(say), tuple(range(asked.seeds)), asked.effort, lambda line: say("", line))
    found: dict[Experiment, Finding] = {}
    for name in EXPERIMENTS if asked.name == "all" else [asked.name]:
        experiment = EXPERIMENTS[name]()
        say("begins", name, experiment.of)
        begun = time.perf_counter()
        found[experiment] = experiment.run(setting)
        say("found", name, clock(time.perf_counter() - begun))
        for claim in found[experiment].claims:
            say("holds" if claim.holds else "does not", claim.words)
        try:
            asked.out.mkdir(parents=True, exist_ok=True)
            report.draw(experiment, found[experiment], asked.out)
            path = report.write(found, setting, asked.out)  # again after each: a run that is stopped has those before
        except OSError as error:
            raise Refusal(disk_words(error, asked.out, "nothing was written", "begin again")) from error
    say("wrote", str(path), several(len(found), "figure"))
    return found


def _tokens(say: Callable[..., None]) -> Tokens:
    """Python's own sources, of a small vocabulary."""
    corpus = find(())
    building = lambda: say("tokens", f"building a vocabulary of {VOCAB:,} and encoding the text, once")
    tokens = tokenize(corpus, VOCAB, building=building)
    say("data", corpus.name, f"SHA-256 {corpus.fingerprint[:12]}")
    return tokens

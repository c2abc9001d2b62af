"""`fastlm data pack`: text as ids, written once for any number of runs."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.shards import packing
from fastlm.trainer.data.shards.folders import MANIFEST
from fastlm.trainer.data.shards.sources import Part, Source, named
from fastlm.trainer.data.shards.work import Work
from fastlm.trainer.data.tokenizer import SPECIALS, load_tokenizer
from fastlm.trainer.data.tokens import sha256
from fastlm.trainer.disk import locked
from fastlm.trainer.options.data import Made, Pack
from fastlm.trainer.words import Refusal, clock, command, count, several, size

Say = Callable[..., None]
EVERY = 10.0  # seconds between lines of progress


def pack(asked: Pack, say: Say) -> None:
    """Pack what is asked for.

    Args:
        asked: the command's flags.
        say: called with a label and its parts for each line that is shown.

    Raises:
        Refusal: naming the file or the flag.
        Failure: if a process dies.
    """
    skipped = Skipped()
    sources = named((*asked.sources, *asked.validation), skipped)
    kept, held_out = sources[: len(asked.sources)], sources[len(asked.sources) :]
    request = request_of(asked, kept) | {
        "validation": {source.name: source.state() for source in held_out},
        "tokenizer": None if asked.tokenizer is None else sha256(_ours(asked.tokenizer_file)),
        "vocab": asked.vocab,
    }
    split = "train" if held_out else "both"
    parts, aside = ([part for x in some for part in x.parts(asked.part_bytes)] for some in (kept, held_out))
    told(say, kept, parts, skipped)
    with begun(asked.out):
        work = Work(asked.out, MANIFEST)
        if work.begin(request):
            _make_tokenizer(work, asked, parts, split, say)
            jobs = [(part.name, (part, asked.text_key, split)) for part in parts]
            jobs += [(part.name, (part, asked.text_key, "held_out")) for part in aside]
            watched(work, jobs, packing.pack, asked, say, "packed")
            packing.finish(work, request, [*parts, *aside])
        _say_end(asked.out, say)


def request_of(asked: Made, sources: Sequence[Source]) -> dict:
    """What the output depends on, all of it."""
    return {
        "sources": {source.name: source.state() for source in sources},
        "text key": asked.text_key,
        "part": asked.part_bytes,
    }


def told(say: Say, sources: Sequence[Source], parts: Sequence[Part], skipped: Skipped) -> None:
    """Say what there is to work on."""
    for source in sources:
        there = sum(path.stat().st_size for path, _ in source.files)
        say("source", source.name, str(source.path), several(len(source.files), "file"), size(there))
    for line in skipped.lines():
        say("skipped", line)
    say("parts", str(len(parts)))


def begun(out: Path):
    """The folder made, and others kept out of it inside the `with` block."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--out {out} cannot be made ({error.strerror}); give another folder") from error
    return locked(out)


def watched(work: Work, jobs: list, call: Callable[..., dict], asked: Made, say: Say, word: str) -> None:
    """Do the jobs, with a line about them now and then."""
    done = sum(work.found(name) is not None for name, _ in jobs)
    if done:
        say("goes on", f"{done} of {several(len(jobs), 'part')} are {word}")
    begin = shown = time.perf_counter()
    for n, _ in enumerate(work.do(jobs, call, asked.processes), done + 1):
        now = time.perf_counter()
        if now - shown > EVERY:
            left = (now - begin) / (n - done) * (len(jobs) - n)
            say(word, f"{n} of {len(jobs)}", f"{clock(left)} left")
            shown = now


def _ours(path: Path) -> Path:
    tokenizer = load_tokenizer(path)
    if [tokenizer.token_to_id(token) for token in SPECIALS] != list(range(len(SPECIALS))):
        raise Refusal(
            f"{path} is no tokenizer of fastlm's, whose ids 0 to {len(SPECIALS) - 1} are {' '.join(SPECIALS)}; give "
            "one that fastlm made"
        )
    return path


def _make_tokenizer(work: Work, asked: Pack, parts: Sequence[Part], split: str, say: Say) -> None:
    if (work.out / packing.TOKENIZER).exists():
        return
    if asked.tokenizer is not None:
        with work.file(work.out / packing.TOKENIZER) as file:
            file.write(asked.tokenizer_file.read_bytes())
        return
    say("tokens", f"learning a vocabulary of {asked.vocab:,} from the first documents of every part")
    packing.learn_tokenizer(work, parts, asked.text_key, split, asked.vocab)


def _say_end(out: Path, say: Say) -> None:
    from fastlm.trainer.data.shards.packed import open_packed

    packed = open_packed(out)
    for line in packed.skipped.lines():
        say("skipped", line)
    sides = (f"{count(sum(x.tokens for x in packed.of_side(side)))} {words}" for side, words in WORDS.items())
    say("done", f"byte-level BPE {packed.vocab_size:,}", *(f"{each}" for each in sides), size(packed.bytes))
    say("next", command("data", "inspect", out), command("pretrain", "--data", out))


WORDS = {"train": "tokens to train on", "held_out": "held out"}

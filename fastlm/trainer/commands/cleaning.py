"""`fastlm data clean`: what of a text is worth learning from, and a report of what is not."""

import json
from collections import Counter
from collections.abc import Callable

from fastlm.trainer.commands.packing import begun, request_of, told, watched
from fastlm.trainer.data.cleaning import passes
from fastlm.trainer.data.cleaning.rules import OF_LINES
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.shards.reading import placed
from fastlm.trainer.data.shards.sources import Part, named
from fastlm.trainer.data.shards.work import Work
from fastlm.trainer.options.data import Clean
from fastlm.trainer.words import command, several, size

Say = Callable[..., None]
REPORT = "report.json"
FORMAT = 2  # raise it when another version drops something else


def clean(asked: Clean, say: Say) -> None:
    """Clean what is asked for.

    Args:
        asked: the command's flags.
        say: called with a label and its parts for each line that is shown.

    Raises:
        Refusal: naming the file or the flag.
        Failure: if a process dies.
    """
    skipped = Skipped()
    sources = named(asked.sources, skipped)
    words = asked.bad_words.read_text(encoding="utf-8").lower().split("\n") if asked.bad_words else []
    what = passes.Cleaning(
        asked.text_key, tuple(sorted(asked.without)), frozenset(filter(None, map(str.strip, words))), asked.language,
        asked.languages, asked.quality, asked.least_quality,
    )  # fmt: skip
    request = request_of(asked, sources) | {
        "rules": [FORMAT, *what.without], "bad words": sorted(what.bad_words), "languages": what.languages,
        "judges": [what.language, what.quality, what.least_quality],
    }  # fmt: skip
    parts = [part for source in sources for part in source.parts(asked.part_bytes)]
    told(say, sources, parts, skipped)
    with begun(asked.out):
        work = Work(asked.out, REPORT)
        if work.begin(request):
            watched(work, [(part.name, (part, what)) for part in parts], passes.judge, asked, say, "judged")
            if work.found("repeats") is None:
                passes.find_repeats(work, parts)
                work.write(work.folder / "repeats.json", "{}")
            watched(work, [(f"{part.name}.kept", (part, what)) for part in parts], passes.keep, asked, say, "written")
            work.write(work.last, json.dumps(_report(work, request, parts), indent=1, ensure_ascii=False))
            work.end()
    _say_report(json.loads(work.last.read_text(encoding="utf-8")), say)
    say("next", command("data", "pack", *sorted({str(asked.out / part.source) for part in parts}), "--out", "DIR"))


def _report(work: Work, request: dict, parts: list[Part]) -> dict:
    """What was dropped of each source, and why."""
    sources: dict[str, dict] = {}
    for part in parts:
        source = sources.setdefault(part.source, {"counts": Counter(), "examples": {}, "skipped": {}})
        for found in (work.found(part.name), work.found(f"{part.name}.kept")):
            source["counts"].update(found["counts"])
            for name in ("examples", "skipped"):
                source[name] = Skipped.merged(source[name], found.get(name, {})).to_json()
    for name, source in sources.items():
        those = [part for part in parts if part.source == name]
        source.update({kind: placed(source[kind], those) for kind in ("examples", "skipped")})
    return {"asked": request, "sources": {name: _worded(source) for name, source in sources.items()}}


def _worded(source: dict) -> dict:
    counts = source["counts"]
    dropped = {
        reason: {
            "meaning": meaning,
            "unit": "sentences" if reason == "spans" else "lines" if reason in OF_LINES else "documents",
            "count": counts[reason],
            "examples": source["examples"].get(reason, [0, []])[1],
        }
        for reason, meaning in passes.REASONS.items()
        if counts[reason]
    }
    there = {name: counts[name] for name in ("documents", "bytes", "kept documents", "kept bytes")}
    return there | {"dropped": dropped, "skipped": source["skipped"]}


def _say_report(report: dict, say: Say) -> None:
    for name, source in report["sources"].items():
        for line in Skipped.merged(source["skipped"]).lines():
            say("skipped", line)
        kept, there = source["kept documents"], source["documents"]
        share = f"{source['kept bytes'] / max(1, source['bytes']):.1%} of {size(source['bytes'])}"
        say("kept", name, f"{kept:,} of {several(there, 'document')}", share)
        for reason, found in source["dropped"].items():
            say("", f"{reason:<12}{found['count']:>12,} {found['unit']:<10} {found['meaning']}")
            if found["examples"]:
                say("", f"{'':<12}{found['examples'][0]}")

"""What a run takes of memory, however large its text is, and what it refuses because it would not fit."""

import json
import random
import re
import sys

import pytest
from runs import config, flags, python

from fastlm.trainer import memory
from fastlm.trainer.words import Refusal

# ru_maxrss would not do: a process begins with its parent's, and the parent here is a test run of a gigabyte
PEAK = """
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
"""
counted = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's own memory is read from /proc")

PEAKS = f"""
import re, sys
from fastlm.trainer import cli
{PEAK}
for argv in sys.argv[1:]:
    assert cli.main(argv.split("|")) == 0
    print("peak", peak())
"""


@counted
def test_a_large_text_takes_little_memory(text, tmp_path):
    """2 MB are read, encoded, trained on and evaluated in 150 MB more than 100 kB are."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(4000)]
    rows = [" ".join(draw.choices(words, k=40)) for _ in range(8000)]
    (tmp_path / "small.txt").write_text("\n".join(rows[:400]))
    (tmp_path / "large.txt").write_text("\n".join(rows))
    (tmp_path / "large.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shape = dict(vocab=2048, context=64, batch=32, dim=8, heads=1, steps=2, evaluations=0)
    names = "small.txt", "large.txt", "large.jsonl"
    asked = [config(tmp_path / name, tmp_path / f"run-{name}", **shape) for name in names]
    done = python(PEAKS, *("|".join(["pretrain", *flags(each)]) for each in asked))
    assert done.returncode == 0, done.stderr
    small, *large = [int(line.split()[1]) / 2**20 for line in done.stdout.splitlines() if line.startswith("peak")]
    assert all(peak - small < 150 for peak in large), (small, large)


VOCABULARY = f"""
import random, re, sys
from fastlm.trainer.data import tokenizer
from fastlm.trainer.data.corpus import find
{PEAK}
folder, tokenizer.LEARNED, tokenizer.DISTINCT = Path(sys.argv[1]), 1_000_000, 200_000
draw = random.Random(0)
with (folder / "text.txt").open("w") as file:  # Chinese without spaces, 4 MB
    for _ in range(1400):
        file.write("".join(map(chr, draw.choices(range(0x4E00, 0x9FA5), k=1000))))
found, before = find((folder / "text.txt",)), peak()
share = tokenizer.learned_share(found.documents(held_out=False), found.bytes)
tokenizer.train(found.documents(held_out=False), 2048, folder / "tokenizer.json", share)
encoder = tokenizer.load_tokenizer(folder / "tokenizer.json")
tokenizer.encode(encoder, found.documents(held_out=False), folder / "train.bin")
print(peak() - before)
"""


@counted
def test_a_vocabulary_takes_the_memory_of_what_it_is_learned_from(tmp_path):
    """Learned from all 4 MB it takes 300 MB."""
    done = python(VOCABULARY, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 160e6


# ---------------------------------------------------------------------------------------------------------------------
# The reckoning before a run

RECKONED = f"""
import re, sys
from fastlm.trainer import memory
from fastlm.trainer.options.config import Config
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.step import Trainer
{PEAK}
tokens = tokenize(find((Path(sys.argv[1]),)), 300)
peaks = []
for batch in (1, 700):
    config = Config(vocab=300, context=64, dim=64, layers=3, heads=2, batch=batch, threads=1).settled()
    reckoned = memory.reckon(config, tokens.facts.vocab_size)
    Trainer(config, tokens, 1).update()
    peaks.append(peak())
print(reckoned.rows, peaks[1] - peaks[0])
"""


@counted
def test_what_is_reckoned_is_what_is_taken(text):
    done = python(RECKONED, str(text))
    assert done.returncode == 0, done.stderr
    reckoned, taken = map(int, done.stdout.split())
    assert 0.8 < taken / reckoned < 1.25


@pytest.mark.parametrize("preset", ["bert", "deberta-v3", "xlnet", "bart"])
def test_models_with_dropout_padding_and_two_parts_are_reckoned(text, preset):
    few, many = (memory.reckon(config(text, preset=preset, layers=n, dropout=0.1), 300) for n in (2, 4))
    assert many.model > few.model > 0 and many.rows > few.rows > 0


def test_layers_and_rows_are_reckoned_without_being_made(text):
    """Two layers are looked at, and as many are reckoned as there are."""
    few, many = (memory.reckon(config(text, layers=n), 300) for n in (3, 5))
    more, most = (memory.reckon(config(text, layers=n), 300) for n in (4, 10**9))
    assert many.model - more.model == more.model - few.model > 0 and many.rows - more.rows == more.rows - few.rows > 0
    assert most.model > 10**9 * (more.model - few.model)


@pytest.mark.parametrize("changes, words", [
    (dict(batch=100_000), r"--batch 100000 of --context 16 takes .*; --batch \d+ --accumulate \d+ makes"),
    (dict(batch=3, accumulate=10**8), r"--batch 3 times --accumulate 100000000 are rows whose ids take"),
    (dict(dim=10**6), r"--dim 1000000, --layers 1 and --vocab 300 make a model that takes"),
    (dict(layers=10**6), r"--layers 1000000 and --vocab 300 make"),
    (dict(vocab=10**9), r"--vocab 1000000000 make"),
    (dict(context=10**6, batch=1), r"--context 1000000 takes .*; give a smaller --context, --dim or --vocab"),
    (dict(context=10**9, preset="gpt"), r"--context 1000000000 is longer than the text, which has 200 MB"),
    (dict(context=10**7, preset="gpt"), r"make a model that takes"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(text, monkeypatch, changes, words):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100_000_000)
    asked = config(text, **changes)
    with pytest.raises(Refusal, match=words) as refused:
        memory.check(asked, 2 * 10**8)
    assert "\n" not in str(refused.value)


def test_what_fits_is_not_refused_and_the_cure_fits(text, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100_000_000)
    memory.check(config(text), 20_000)
    with pytest.raises(Refusal) as refused:
        memory.check(config(text, batch=10_000), 20_000)
    batch, accumulate = map(int, re.search(r"--batch (\d+) --accumulate (\d+)", str(refused.value)).groups())
    assert batch * accumulate >= 10_000
    memory.check(config(text, batch=batch, accumulate=accumulate), 20_000)

"""What a run takes of memory, however large its text is, and what it refuses because it would not fit."""

import json
import random
import sys

import pytest
from runs import config, flags, python

PEAKS = """
import resource, sys
from fastlm.trainer import cli
for argv in sys.argv[1:]:
    assert cli.main(argv.split("|")) == 0
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in other units, or not at all, elsewhere")
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
    small, *large = [int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("peak")]
    assert all(peak - small < 150 for peak in large), (small, large)

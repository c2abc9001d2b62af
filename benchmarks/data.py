"""How fast text is made clean and packed, how much memory that takes, and what of it is the tokenizer's.

    python benchmarks/data.py --megabytes 1000 --processes 2

The text is made: pages of sentences of 200,000 words, by Zipf's law; one in ten repeats an earlier page, half of those
with a line of a menu. Both commands run as a user starts them, with the start of Python in their times.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fastlm.trainer.data import tokenizer

WORDS, KEPT = 200_000, 2_000


def write_pages(path: Path, size: int) -> None:
    """A .jsonl of about so many bytes."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(draw.choice(letters, n)) for n in draw.integers(2, 10, WORDS)]
    odds = np.cumsum(1 / np.arange(1, WORDS + 1))
    pages: list[str] = []
    with path.open("w") as file:
        while file.tell() < size:
            if pages and draw.random() < 0.1:
                page = pages[draw.integers(len(pages))] + "\nMenu | Home" * int(draw.integers(2))
            else:
                drawn = np.searchsorted(odds, draw.random(600) * odds[-1])
                sentences = [" ".join(words[i] for i in some).capitalize() + "." for some in drawn.reshape(-1, 12)]
                page = "\n".join(" ".join(sentences[i : i + 5]) for i in range(0, 50, 5))
                pages = pages if len(pages) == KEPT else [*pages, page]
            file.write(json.dumps({"text": page}) + "\n")


def timed(*words: object) -> tuple[float, float]:
    """Seconds, and the largest process's peak of megabytes so far."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastlm", "data", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3


def encoding(path: Path, file: Path, size: int) -> None:
    """One thread's MB/s: the tokenizer's own, and ours with what it is still asked."""
    compiled = tokenizer.load_tokenizer(file)
    with path.open() as rows:
        texts = [json.loads(next(rows))["text"] for _ in range(max(1, size // 4000))]
    pieces = [piece for text in texts for piece in tokenizer.pieces(text)]
    encoder, asked = tokenizer.encoder_of(compiled), 0.0

    def spent(call, *arguments):
        begin = time.process_time()
        made = call(*arguments)
        return made, time.process_time() - begin

    theirs, alone = spent(compiled.encode_batch_fast, pieces)
    learn = encoder._asked

    def counted(words):
        nonlocal asked
        made, took = spent(learn, words)
        asked += took
        return made

    encoder._asked = counted
    blocks = [pieces[i : i + tokenizer.BATCH] for i in range(0, len(pieces), tokenizer.BATCH)]
    every = lambda: np.concatenate([encoder(block)[0] for block in blocks])
    ours, took = spent(every)
    assert ours.tolist() == [i for found in theirs for i in found.ids]
    _, again = spent(every)
    there = sum(map(len, pieces)) / 1e6
    share = f"of which {asked / took:.0%} of the time is the tokenizer's"
    print(f"encode   tokenizers {there / alone:.1f} MB/s · by words first met {there / took:.1f}, {share}", end=" · ")
    print(f"by words that are known {there / again:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, there = Path(folder) / "web.jsonl", asked.megabytes * 1e6
        write_pages(path, int(there))
        for words in (("clean", path, "--out", f"{folder}/clean"), ("pack", path, "--out", f"{folder}/packed")):
            seconds, memory = timed(*words, "--processes", asked.processes)
            speed = f"{there / seconds / 1e6:.1f} MB/s in {asked.processes} processes"
            print(f"{words[0]:<8} {speed} · {memory:.0f} MB in the largest", flush=True)
        encoding(path, Path(folder) / "packed" / "tokenizer.json", min(int(there), 20_000_000))


if __name__ == "__main__":
    main()

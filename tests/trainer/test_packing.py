"""Packing: the same files bit for bit however often it was stopped; damage is named; a run reads sources in shares."""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from dying import killed
from runs import fail, repeatable, stop_before, train

from fastlm.objectives import Causal, Vocabulary
from fastlm.objectives.samples import Windows
from fastlm.objectives.samples.mixture import PERIOD, Mixture, apportioned, interleaved
from fastlm.trainer import cli
from fastlm.trainer.commands import run
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.shards import packing
from fastlm.trainer.data.shards.packed import checked
from fastlm.trainer.data.shards.reading import documents, placed
from fastlm.trainer.data.shards.sources import named
from fastlm.trainer.data.tokenizer import EOS, load_tokenizer
from fastlm.trainer.words import Refusal


def rows(path, n, seed=0):
    draw = random.Random(seed)
    texts = [f"document {i} says {draw.choice('abc') * draw.randint(1, 30)} é\nand ends." for i in range(n)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture
def sources(tmp_path):
    """web.jsonl, and a folder of books."""
    rows(tmp_path / "web.jsonl", 400)
    (tmp_path / "books").mkdir()
    for i in range(60):
        (tmp_path / "books" / f"{i}.txt").write_text(f"book {i} tells a tale of {i * i} words.\n" * 5)
    return tmp_path


def pack(sources, out, *more) -> int:
    asked = ["data", "pack", str(sources / "web.jsonl"), str(sources / "books"), "--out", str(out)]
    return cli.main([*asked, "--vocab", "300", "--part", "0.006", "--processes", "1", *more])


def tree(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_all_of_the_text_is_there_once(sources):
    assert pack(sources, sources / "out") == 0
    packed, tokenizer = checked(sources / "out"), load_tokenizer(sources / "out" / "tokenizer.json")
    tokens = packed.tokens()
    for side, ids in (("train", tokens.train), ("held_out", tokens.held_out)):
        whole = ids[0 : len(ids)]
        found = [tokenizer.decode(each.tolist()) for each in np.split(whole, np.flatnonzero(whole == EOS) + 1)][:-1]
        wanted = []
        for source in named([str(sources / "web.jsonl"), str(sources / "books")], Skipped()):
            for part in source.parts(10**9):
                for document in documents(part, "text", Skipped().add):
                    wanted += [text for name, text in packing.sides_of(document.text, "both").items() if name == side]
        assert found == wanted and len(found) > 5
    assert tokens.facts.held_out_bytes == tokens.bytes_of()[tokens.held_out[: len(tokens.held_out)]].sum()
    assert not (sources / "out" / ".work").exists() and len(packed.of_side("train")) > 4


def test_killed_at_any_moment_and_gone_on(sources):
    """By SIGKILL, in processes of which one works at a time, at moments all over the work."""
    pack(sources, sources / "whole")
    out = sources / "killed"
    asked = ["data", "pack", str(sources / "web.jsonl"), str(sources / "books"), "--out", str(out), "--vocab", "300"]
    asked += ["--part", "0.006", "--processes", "1"]
    for at in (2, 11, 30):
        killed("fastlm.trainer.disk.flush", at, *asked)
    assert pack(sources, out) == 0 and tree(out) == tree(sources / "whole")


def test_two_processes_make_the_same_and_go_on_after_a_kill(sources):
    pack(sources, sources / "one")
    asked = [sys.executable, "-m", "fastlm", "data", "pack", str(sources / "web.jsonl"), str(sources / "books")]
    asked += ["--out", str(sources / "two"), "--vocab", "300", "--part", "0.006", "--processes", "2"]
    running = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(sources.glob("two/.work/web-*.json")) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    running.kill()
    running.wait()
    assert subprocess.run(asked, capture_output=True).returncode == 0
    assert tree(sources / "two") == tree(sources / "one")


def test_another_request_and_changed_sources_do_not_go_on(sources, capsys):
    pack(sources, sources / "out")
    before = tree(sources / "out")
    assert pack(sources, sources / "out") == 0 and tree(sources / "out") == before
    capsys.readouterr()
    assert pack(sources, sources / "out", "--vocab", "310") == 2
    assert "was begun with other vocab; ask for the same again" in capsys.readouterr().err
    rows(sources / "web.jsonl", 10)
    assert pack(sources, sources / "out") == 2 and tree(sources / "out") == before


@pytest.mark.parametrize("harm, words", (
    (lambda path: os.truncate(path, 2), "has 2 bytes"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\7"), "is damaged"),
    (os.unlink, "is missing"),
), ids=("cut", "altered", "deleted"))  # fmt: skip
def test_a_damaged_shard_is_named(sources, capsys, harm, words):
    pack(sources, sources / "out")
    assert cli.main(["data", "inspect", str(sources / "out")]) == 0
    assert "files are as they were written" in capsys.readouterr().out
    path = sources / "out" / "web" / "train-00002.bin"
    harm(path)
    assert cli.main(["data", "inspect", str(sources / "out")]) == 1
    assert f"{path} {words}" in capsys.readouterr().err
    assert cli.main(["pretrain", "--data", str(sources / "out"), "--out", str(sources / "run")]) == 2
    assert f"{path} {words}" in capsys.readouterr().err


def places(found, parts) -> list[str]:
    return placed({"": [len(found), [document.mark for document in found]]}, parts)[""][1]


@pytest.mark.parametrize("size", (1, 7, 100, 10**6))
def test_parts_of_any_size_have_every_line_once_and_in_its_place(tmp_path, size):
    texts = rows(tmp_path / "some.jsonl", 20)
    (source,) = named([f"mine={tmp_path / 'some.jsonl'}"], Skipped())
    parts = source.parts(size)
    found = [document for part in parts for document in documents(part, "text", Skipped().add)]
    assert [document.text for document in found] == texts
    assert places(found, parts) == [f"some.jsonl:{i}" for i in range(1, 21)]


def test_tables_of_columns(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'fastlm[data]'")
    import pyarrow.parquet as pq

    texts = [f"row {i}" for i in range(50)]
    table = pa.table({"text": texts, "n": list(range(50))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20)
    saved = tmp_path / "saved"  # as datasets' save_to_disk leaves it
    saved.mkdir()
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (saved / "dataset_info.json").write_text("{}")
    with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    with pa.ipc.new_file(tmp_path / "f.arrow", table.schema) as file:
        file.write_table(table)
    for path in (tmp_path / "t.parquet", saved, tmp_path / "f.arrow"):
        (source,) = named([str(path)], Skipped())
        for size in (1, 10**6):
            parts = source.parts(size)
            found = [document for part in parts for document in documents(part, "text", Skipped().add)]
            assert [document.text for document in found] == texts and places(found, parts)[-1].endswith(":50")


def test_what_cannot_be_a_source_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("text")
    for words, said in (
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path / "a.txt"), str(tmp_path / "b" / "a.txt")], "both sources named a; give NAME=PATH"),
        ([f"a b={tmp_path / 'a.txt'}"], "give NAME=PATH"),
    ):
        with pytest.raises(Refusal, match=said):
            named(words, Skipped())


def test_shares_are_exact_in_every_period():
    counts = apportioned([0.3, 0.5, 0.2])
    source, place = interleaved(counts)
    assert counts.tolist() == [3000, 5000, 2000] and len(source) == PERIOD
    for which, count in enumerate(counts):
        assert place[source == which].tolist() == list(range(count))
        met = np.cumsum(source == which)
        assert abs(met - count / PERIOD * np.arange(1, PERIOD + 1)).max() < 2  # at every moment, not only at the end
    assert apportioned([1, 1, 1]).sum() == PERIOD


def test_a_mixture_draws_each_source_in_its_own_order():
    streams = [np.arange(1000), 10_000 + np.arange(300)]
    task = Causal(Mixture(streams, [3, 1]), 9, Vocabulary(20_000))
    rows = task.batch(4, 0, 800)["inputs"]
    for number, stream in enumerate(streams):
        mine = rows[(rows[:, 0] >= 10_000) == bool(number)]
        alone, _, _ = Windows(stream, 10, 1, number).drawn(4, 0, len(mine))
        assert (mine == alone[:, :-1]).all() and len(mine) == (600, 200)[number]
    assert (task.batch(4, 123, 50)["inputs"] == rows[123:173]).all()  # a function of seed and number
    with pytest.raises(ValueError, match="less than one of 10,000 samples"):
        Mixture(streams, [1, 1e-6])


def test_a_run_over_shards_goes_on_where_it_was(sources, tmp_path, monkeypatch, capsys):
    pack(sources, sources / "out")
    asked = dict(data=(sources / "out",), weights=("web=0.75", "books=0.25"))
    train(sources, tmp_path / "whole", **asked)
    stop_before(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(sources, tmp_path / "run", **asked)
    run.resume(tmp_path / "run")
    assert repeatable(tmp_path / "run") == repeatable(tmp_path / "whole")
    capsys.readouterr()
    there = "pretrain", "--data", str(sources / "out"), "--out", str(tmp_path / "other")
    for words, said in (
        (["--weights", "web=1"], "says nothing of books"),
        (["--weights", "wep=1", "books=1"], "wep is unknown"),
        (["--weights", "web=-1", "books=1"], "is no share"),
        (["--weights", "web=1", "books=1", "--preset", "albert"], "pairs texts"),
        (["--vocab", "400"], "contradicts"),
        (["--validation", str(sources / "web.jsonl")], "has its held-out side"),
    ):
        assert said in fail(capsys, *there, *words)

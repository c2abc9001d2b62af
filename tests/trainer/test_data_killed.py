"""`fastlm data` killed at moments that nobody chose, and the processes that it starts: the same files in the end."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from dying import outlived

from fastlm.trainer import cli
from fastlm.trainer.data.shards.folders import MANIFEST
from fastlm.trainer.data.shards.work import Work
from fastlm.trainer.words import Failure


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Pages, some of them twice, with menus."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("web") / "web.jsonl"
    sentence = lambda: " ".join(f"word{draw.randrange(500)}" for _ in range(8)).capitalize() + "."
    pages = [" ".join(sentence() for _ in range(20)) + "\nMenu | Home" for _ in range(80)]
    path.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages + pages[10:20]))
    return path


def tree(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name, more", (("clean", ()), ("pack", ("--vocab", "300"))), ids=("clean", "pack"))
def test_killed_at_random_moments_and_gone_on(web, tmp_path, name, more):
    asked = ["data", name, str(web), "--part", "0.02", "--processes", "1", *more, "--out"]
    assert cli.main([*asked, str(tmp_path / "known")]) == 0  # what is made once in a process
    begin = time.process_time()
    assert cli.main([*asked, str(tmp_path / "whole")]) == 0
    took = time.process_time() - begin
    draw = random.Random(0)
    died = [not outlived(took * share, *asked, str(tmp_path / "killed")) for share in (draw.random() for _ in range(5))]
    assert any(died)
    assert cli.main([*asked, str(tmp_path / "killed")]) == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def fatal(work: Work, n: int) -> dict:
    """A job that is killed if it runs in a process of a pool, and is the third."""
    if n == 2 and multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    with work.file(work.out / f"{n}.txt") as file:
        file.write(str(n).encode())
    return {"n": n}


def test_a_process_that_is_killed_is_told_and_its_job_is_done_again(tmp_path):
    work, jobs = Work(tmp_path, MANIFEST), [(f"job-{n}", (n,)) for n in range(4)]
    assert work.begin({"asked": 1})
    with pytest.raises(Failure, match=r"was killed, as for want of memory; the same command goes on"):
        list(work.do(jobs, fatal, 2))
    assert not (tmp_path / "2.txt").exists()
    list(work.do(jobs, fatal, 1))
    assert [(tmp_path / f"{n}.txt").read_text() for n in range(4)] == list("0123")
    assert [work.found(name) for name, _ in jobs] == [{"n": n} for n in range(4)]

"""The benchmarks themselves, at tiny sizes on a CPU: everything that runs on a GPU has run here first, as far as it
can.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rooms(monkeypatch) -> SimpleNamespace:
    """The modules of benchmarks/, which import one another by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import attention
    import report
    import shapes
    import timing

    return SimpleNamespace(attention=attention, report=report, shapes=shapes, timing=timing)


def run(*command: str, **environment: str) -> str:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env = alone | {"OMP_NUM_THREADS": "1"} | environment  # workers measure nothing
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, benchmarks/gpu/run.py itself is the test")
def test_the_gpu_run(tmp_path):
    kinds = tuple(f"### {kind} on" for kind in ("adamw", "adafactor", "lamb", "sgd", "bf16", "masters"))
    parts = {
        "attention": ("t5 backward", "alibi forward", "none forward"),
        "optimizers": (*kinds, "bare smoke", "chain smoke", "% of copy"),
        "loss": ("### loss on", "N 32 V 50 D 16 float32", "50 % of them targets"),
    }
    command = (sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py"))
    for call, said in parts.items():
        table = run(*command, call, "--smoke", OUT=str(tmp_path))
        assert all(part in table for part in said)
        drawn = {".png"} if call != "loss" else set()  # one size each
        assert {p.suffix for p in (tmp_path / call).iterdir()} == {".jsonl", ".md", ".log"} | drawn


def test_pytest_benchmarks_and_their_report(tmp_path):
    measured = tmp_path / "cpu.json"
    select = "adamw or (t5-512-both and not umt5) or none-512-forward or rope-512-both"
    run(
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "benchmarks"),
        "--smoke",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        select,
        f"--benchmark-json={measured}",
    )
    rows = [b["extra_info"] for b in json.loads(measured.read_text())["benchmarks"]]
    assert len(rows) == 5 and all({"ratio", "seconds", "machine"} <= row.keys() for row in rows)
    assert "rope both, B1 H2 L16 D16 float32" in run(
        sys.executable, str(ROOT / "benchmarks" / "report.py"), str(measured), "--out", str(tmp_path)
    )
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_bytes_of_operators(rooms):
    """A sum of two rows, of which one is repeated; in place; and of a tensor with itself. Views move nothing."""
    import traffic

    x, row = torch.zeros(4, 8), torch.zeros(8).expand(4, 8)
    for run, numbers in (
        (lambda: x + row, 2 * 32 + 8),
        (lambda: x.add_(row), 2 * 32 + 8),
        (lambda: x + x, 2 * 32),
        (lambda: x.t().unflatten(0, (2, 4))[0], 0),
        (lambda: x @ x.t(), 32 + 32 + 16),  # two views of one tensor are two operands
    ):
        with traffic.Traffic() as counted:
            run()
        assert sum(counted.bytes.values()) == 4 * numbers


def test_bytes_of_blocks(tmp_path):
    table = run(sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "traffic.py"), "gpt", "t5")
    cells = {tuple(c.strip() for c in line.split("|")[1:3]): line.split("|") for line in table.splitlines()}
    for preset in ("gpt", "t5"):
        theirs, ours = (float(cells[preset, side][-3]) for side in ("transformers", "fastlm"))
        assert 0 < ours < theirs


def test_ratios_are_taken_within_rounds(rooms, monkeypatch):
    """A machine that slows down over time changes times, not ratios; who raises is left out with the reason."""
    slowness = iter(range(1, 1000))
    pace = {}

    def fake(calls, batch):
        return lambda: calls[0]() * pace["now"]

    def ours():
        pace["now"] = next(slowness)
        return 1.0

    def broken():
        raise MemoryError("no room")

    monkeypatch.setitem(rooms.timing.CLOCKS, "fake", fake)
    in_order = SimpleNamespace(shuffle=lambda names: names.sort(key=["fastlm", "peer", "null"].index))
    monkeypatch.setattr(rooms.timing.random, "Random", lambda seed: in_order)
    result = rooms.timing.compare(
        {"fastlm": lambda: [ours], "peer": lambda: [lambda: 3.0], "gone": broken}, "fake", rounds=10
    )
    assert result.ratio["peer"] == rooms.timing.Spread(3.0, 3.0, 3.0)
    assert result.left_out == {"gone": "MemoryError: no room"} and result.rounds == 10
    assert "gone left out" in rooms.report.peers(result.row())


def test_gpu_clocks_on_a_make_believe_gpu(rooms, monkeypatch):
    """Events tell the time of a counter that work advances; a graph replays what was captured."""
    now = SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now.ms

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def __init__(self):
            self.cost = 0.0

        def replay(self):
            now.ms += self.cost

    class Capture:
        def __init__(self, graph, stream):
            self.graph = graph

        def __enter__(self):
            self.start = now.ms

        def __exit__(self, *error):
            self.graph.cost, now.ms = now.ms - self.start, self.start

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    takes = lambda ms: lambda: setattr(now, "ms", now.ms + ms)
    for name in ("events", "graph"):
        timer = rooms.timing.CLOCKS[name]([takes(2.0), takes(4.0)], 0.02)
        assert timer() == pytest.approx(0.003)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scheme", ["t5", "alibi", "none"])
def test_every_gpu_contestant_computes_the_same(rooms, monkeypatch, scheme):
    """FlexAttention uncompiled, and SDPA with a forced kernel, agree with ours: the peers are asked the same
    question.
    """
    from torch.nn.attention import SDPBackend

    compiled = torch.compile  # which FlexAttention calls by itself, with other options
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic=None, **options: f if dynamic is False else compiled(f, **options)
    )
    a = rooms.attention
    x = a.make_inputs(rooms.shapes.Attention(scheme, 1, 2, 48, 16, torch.float32), torch.device("cpu"))
    ours = a.ours(x).run().detach()
    bias = a.dense_bias(x) if scheme != "none" else None
    peers = a.flex(x), a.sdpa(x, SDPBackend.MATH, bias), a.eager(x)
    assert all(len(peer.leaves) == 3 + (scheme == "t5") for peer in peers)
    for leaf in {id(t): t for peer in peers for t in peer.leaves}.values():
        leaf.requires_grad_(False)  # on CPUs FlexAttention takes none
    for peer in peers:
        torch.testing.assert_close(peer.run(), ours, rtol=1e-4, atol=1e-5)


def test_a_block_that_is_cut_short_says_what_it_knows(rooms, tmp_path, monkeypatch):
    """It is asked to stop, has time to answer, and is ended with its whole process group if it does not."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import run as gpu_run

    monkeypatch.setattr(gpu_run, "GRACE", 2)
    said = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('one failed')"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    quick = "print('done')"
    commands = [[sys.executable, "-c", code] for code in (said, deaf, quick)]
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    how = gpu_run.run(gpu_run.Block("tests", 5, commands, 1), logs, 5.0)
    assert how.startswith("CUT at its 5 s")
    assert [log.read_text().strip() for log in logs] == ["one failed", "", "done"]


def test_every_block_of_the_gpu_run_has_an_expected_time(rooms, monkeypatch):
    """And what the blocks time themselves fits, with a quarter to spare; rehearse.py counts the tests' kernels too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import plan
    import rehearse

    monkeypatch.setattr(rehearse, "tests", lambda: (0, 0.0))
    monkeypatch.setattr(rehearse, "ahead", lambda what: (0, 0.0))
    for call, blocks in plan.calls(Path(), smoke=False).items():
        assert sum(block.cap for block in blocks) <= plan.TOTAL
        for block in blocks:
            assert rehearse.expected(call, block)[1] <= 0.75 * block.cap, (call, block.name)


def test_several_processes_and_the_model_of_them(tmp_path):
    """By tiny sizes on one process and two; and each term of the model as it is when the others are nothing."""
    out = tmp_path / "scale.json"
    command = (sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--smoke", "--rounds", "2", "--worlds", "1", "2")
    said = run(*command, "--out", str(out))
    assert "| 2 | parameters |" in said and "| 13B | 1,024 | gradients | 52.15 | 333 | 2,078 |" in said
    made = json.loads(out.read_text())
    assert len(made["collectives"]) == 9 and len(made["updates"]) == 6


def test_the_model_of_several_processes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale

    sizes = [(what, size, world) for what in scale.HOPS for size in (2**12, 2**20, 2**24) for world in (2, 3, 4)]
    measured = [
        dict(what=what, bytes=size, world=world, seconds=scale.collective(what, size, world, 1e-4, 2e9))
        for what, size, world in sizes
    ]
    assert scale.fitted(measured) == pytest.approx((1e-4, 2e9))
    assert scale.sent("all_reduce", 400, 4) == (6, 600)
    update = dict(shard="parameters", world=2, parameters=1000)
    once = scale.collective("all_gather", 4000, 2, 1e-4, 2e9)
    assert scale.predicted(update, 1.0, 1e-4, 2e9) == pytest.approx(1.0 + 3 * once)

"""Several processes train as one does: the same samples, losses and weights, however the model is divided."""

import io
import os
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from dying import command
from runs import config, flags, repeatable, write_text
from safetensors.torch import load_file
from sharded import on

from fastlm.optim import OPTIMIZERS
from fastlm.optim.sharding import local
from fastlm.trainer import checkpoint, cli
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.distributed.ranks import ALONE, Ranks
from fastlm.trainer.distributed.shards import bytes_each, inner
from fastlm.trainer.options.training import SHARDS
from fastlm.trainer.pull import Pull, starts_of
from fastlm.trainer.step import Trainer

STEPS = 6
PRESETS = ("llama", "bert", "t5", "albert", "electra")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Four documents, for text of a pair come from two; beside them the cache."""
    folder = tmp_path_factory.mktemp("home") / "text"
    folder.mkdir()
    for seed in range(4):
        write_text(folder / f"{seed}.txt", seed, lines=150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        yield folder


def make(text: Path, ranks: Ranks, **changes) -> Trainer:
    """On 3 ranks, rows are 1, 1 and 2; micro-batches have other numbers of targets."""
    os.environ["XDG_CACHE_HOME"] = str(text.parent / "cache")  # in processes that other tests use as well
    asked = config(text, **dict(context=32, layers=2, accumulate=2, lr=2e-3) | changes).settled()
    trainer = Trainer(asked, tokenize(find((text,)), asked.vocab), STEPS, ranks=ranks)
    if asked.pull:
        with trainer.filling() as model:
            trainer.pull = Pull(asked.pull, trainer.model, starts_of(model, ()))
    return trainer


class Course(NamedTuple):
    """What a run makes on its way: weights before the first update, losses of held-out text, each update's losses,
    norm, targets and tokens, losses again, and where the model is gathered its weights and a sample.
    """

    first: list[torch.Tensor]
    before: dict[str, float]
    updates: list[tuple[dict[str, float], float, int, int]]
    after: dict[str, float]
    last: dict[str, torch.Tensor] | None
    sample: str


def course(trainer: Trainer) -> Course:
    with trainer.filling() as model:
        first = [p.detach().clone() for p in model.parameters()]
    before, updates = trainer.evaluate(), []
    for _ in range(STEPS):
        made = trainer.update()
        losses = {name: float(x) for name, x in made.losses.items()}
        updates.append((losses, float(made.norm), made.targets, made.tokens))
    after, whole = trainer.evaluate(3), trainer.whole()
    last = None if whole is None else {name: p.detach() for name, p in whole.named_parameters()}
    return Course(first, before, updates, after, last, trainer.sample(8))


def run_alone(text: Path, path: Path, **changes) -> None:
    """Leave one process's course in a file."""
    torch.save(course(make(text, ALONE, **changes)), path)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """alone(**changes): the file of one process's course, which is run once for all that are compared with it."""
    folder = tmp_path_factory.mktemp("alone")

    def run_once(**changes) -> Path:
        path = folder / " ".join(f"{name} {value}" for name, value in changes.items())
        if not path.exists():
            run_alone(text, path, **changes)
        return path

    return run_once


def equals_one_process(rank: int, world: int, text: Path, one: Path, **changes) -> None:
    many, one = course(make(text, Ranks(rank, world), **changes)), torch.load(one, weights_only=False)
    exact = dict(rtol=0, atol=0)
    torch.testing.assert_close(many.first, one.first, **exact)
    torch.testing.assert_close(many.before, one.before, rtol=1e-6, atol=1e-6)
    for (losses, norm, *counts), (single, of_single, *wanted) in zip(many.updates, one.updates, strict=True):
        torch.testing.assert_close(losses, single, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(norm, of_single, rtol=2e-5, atol=1e-6)
        assert counts == wanted
    torch.testing.assert_close(many.after, one.after, rtol=1e-5, atol=1e-5)
    assert (many.last is None) == (rank > 0 and changes["shard"] in ("gradients", "parameters"))
    if rank == 0:
        # Adam's first steps make ±lr of a gradient that is a rounding error
        torch.testing.assert_close(many.last, one.last, rtol=1e-3, atol=2e-4)
    assert many.sample == (one.sample if many.last is not None else "")


def every(rank: int, world: int, text: Path, shards: tuple[str, ...], runs: list[tuple[dict, Path]]) -> None:
    for changes, one in runs:
        for shard in shards:
            equals_one_process(rank, world, text, one, shard=shard, **changes)


@pytest.mark.parametrize("shard", SHARDS)
@on(2, 3)
def test_every_division_equals_one_process(ranks, text, alone, shard):
    asked = [dict(preset=preset, dropout=0.0) for preset in PRESETS]
    ranks.run(every, text, (shard,), [(changes, alone(**changes)) for changes in asked])


@on(2, 3)
def test_every_optimizer_steps_as_in_one_process(ranks, text, alone):
    asked = [dict(optimizer=name, lr=None) for name in OPTIMIZERS]
    ranks.run(every, text, SHARDS[1:], [(changes, alone(**changes)) for changes in asked])


@on(2)
def test_weights_are_drawn_back_as_in_one_process(ranks, text, alone):
    asked = [dict(preset="bert", dropout=0.0, pull=100.0, layer_decay=0.7)]
    ranks.run(every, text, SHARDS, [(changes, alone(**changes)) for changes in asked])


def takes_its_part(rank: int, world: int, text: Path, state: Path) -> None:
    """Of starts that one process saved, as of those that it had itself."""
    for shard in SHARDS:
        trainer = make(text, Ranks(rank, world), shard=shard, pull=100.0)
        again = Pull(100.0, trainer.model, checkpoint.start(state))
        assert again.starts.keys() == trainer.pull.starts.keys() != set()
        for p, start in again.starts.items():
            assert start.equal(trainer.pull.starts[p]) and start.shape == local(p).shape


@on(2)
def test_every_rank_takes_its_part_of_saved_starts(ranks, text, tmp_path):
    checkpoint.save_start(tmp_path, dict(starts_of(make(text, ALONE).model, ())))
    ranks.run(takes_its_part, text, tmp_path)


def scales(rank: int, world: int, text: Path) -> None:
    """In fp16, with an overflow that one rank alone meets: all skip that update."""
    for shard in SHARDS:
        trainer = make(text, Ranks(rank, world), shard=shard, dtype="fp16")
        trainer.update()
        before = [local(p.detach()).clone() for p in trainer.model.parameters()]
        ask = trainer.division.ask
        broken = lambda *args: {k: x * torch.inf for k, x in ask(*args).items()}  # noqa: B023
        trainer.division.ask = broken if rank == world - 1 else ask
        scale = trainer.scaler.get_scale()
        trainer.update()
        assert trainer.scaler.get_scale() == scale / 2, shard
        for p, q in zip(trainer.model.parameters(), before, strict=True):
            torch.testing.assert_close(local(p.detach()), q, rtol=0, atol=0)
        trainer.division.ask = ask
        trainer.update()
        assert trainer.finite() and any(
            not local(p.detach()).equal(q) for p, q in zip(trainer.model.parameters(), before, strict=True)
        )


@on(2)
def test_ranks_skip_an_update_together(ranks, text):
    ranks.run(scales, text)


def goes_on(rank: int, world: int, text: Path, folder: Path) -> None:
    """From a checkpoint, on as many ranks and on one."""
    for shard in SHARDS:
        state = folder / f"{shard}-{world}"
        first = make(text, Ranks(rank, world), shard=shard, preset="bert")
        for step in range(STEPS):
            if step == 3:
                model, states = first.whole(), first.division.whole_states(first.optimizer)
                if rank == 0:
                    checkpoint.save(state, step, model, states, {})
                first.ranks.any(False)
            first.update()
        wanted = first.whole()
        for ranks in (first.ranks, *[ALONE] * (rank == 0)):
            again = make(text, ranks, shard=shard, preset="bert")
            with again.filling() as model:
                again.step = checkpoint.restore(state / "step-3", model, again.optimizer)["step"]
            while again.step < STEPS:
                again.update()
            exact = dict(rtol=0, atol=0) if ranks is first.ranks else dict(rtol=1e-3, atol=2e-4)
            whole = again.whole()
            if rank == 0:
                for (name, p), q in zip(whole.named_parameters(), wanted.parameters(), strict=True):
                    torch.testing.assert_close(p, q, **exact, msg=lambda m, what=(shard, name): f"{what}: {m}")


@on(2, 3)
def test_a_checkpoint_is_gone_on_from_bit_for_bit_and_on_other_numbers_of_ranks(ranks, text, tmp_path):
    ranks.run(goes_on, text, tmp_path)


def keeps_what_was_said(rank: int, world: int, text: Path) -> None:
    """After a backward pass, before the update."""
    for shard in SHARDS:
        trainer = make(text, Ranks(rank, world), shard=shard, dim=64)
        trainer.update()
        trainer.optimizer.step = trainer.optimizer.zero_grad = lambda set_to_none=True: None
        trainer.update()
        size = lambda tensors: sum(local(x).nbytes for x in tensors)
        whole = sum(p.numel() * p.itemsize for p in trainer.model.parameters())
        gradients = size(p.grad for p in trainer.model.parameters())
        states = size(x for state in inner(trainer.optimizer).state.values() for x in state.values())
        found = (whole if shard != "parameters" else size(trainer.model.parameters())) + gradients + states
        wanted = bytes_each(whole, whole, 2 * whole, world)[shard]
        assert 0.9 * wanted <= found <= 1.1 * wanted, f"{shard}: {found:,} bytes instead of {wanted:,}"


@on(2)
def test_memory_is_what_the_table_says(ranks, text):
    ranks.run(keeps_what_was_said, text)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that torchrun starts


LONG = dict(steps=12, batch=4, accumulate=2, context=32, save_every=0.0, dropout=0.1, patience=9)


def start(processes: int, *argv: str, code: str = "") -> subprocess.Popen:
    """`torchrun … -m fastlm ARGV`, or code that runs it; in a session of its own, so that a test can end it all."""
    program = ["-c", code] if code else ["-m", "fastlm"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = [*words, "--no-python", sys.executable, *program, *map(str, argv)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen(launcher, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, **options)


def run(processes: int, *argv: str, code: str = "") -> tuple[int, str, str]:
    """(exit status, stdout, what of stderr fastlm said)."""
    process = start(processes, *argv, code=code)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, "".join(line for line in err.splitlines(True) if line.startswith("fastlm: "))


KILLED = """
import os, sys
from fastlm.trainer import cli, step
rank, at = sys.argv[1:3]
update = step.Trainer.update
def killed(trainer):
    if os.environ["RANK"] == rank and trainer.step == int(at):
        os.kill(os.getpid(), 9)
    return update(trainer)
step.Trainer.update = killed
sys.exit(cli.main(sys.argv[3:]))
"""


def whole_run(rank: int, world: int, port: int, store: str, argv: list[str]) -> None:
    """`fastlm ARGV` on ranks that torchrun might have started."""
    dist.destroy_process_group()
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=port)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        for name, value in environment.items():
            patch.setenv(name, str(value))
        assert cli.main(argv) == 0
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@on(2)
def test_a_run_that_draws_weights_back_goes_on_without_its_folder(ranks, text, tmp_path):
    small = flags(config(text, tmp_path / "base", context=32, steps=2))
    assert command("pretrain", *small).returncode == 0
    more = ["--steps", "8", "--batch", "4", "--save-every", "0", "--lr", "5e-3", "--pull", "50", "--evaluations", "0"]
    more += ["--shard", "parameters", "--data", str(text)]
    begins = ["pretrain", "--from", str(tmp_path / "base"), *more, "--out"]
    ranks.run(whole_run, free_port(), str(tmp_path / "store"), [*begins, str(tmp_path / "whole")])
    status, _, _ = run(2, "1", "5", *begins, tmp_path / "parts", code=KILLED)
    assert status == 1
    shutil.rmtree(tmp_path / "base")
    status, out, said = run(2, "resume", tmp_path / "parts")
    assert (status, said) == (0, "") and "from step 5 of 8" in out
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")


@on(2)
@pytest.mark.parametrize("shard, killed", [("none", 1), ("parameters", 0)])
def test_a_run_that_lost_a_rank_goes_on(ranks, text, tmp_path, shard, killed):
    """Its weights end as those of a run that lost none, bit for bit; other numbers of ranks go on from it too."""
    asked = lambda name: ["pretrain", *flags(config(text, tmp_path / name, shard=shard, **LONG))]
    ranks.run(whole_run, free_port(), str(tmp_path / "store"), asked("whole"))
    status, _, said = run(2, str(killed), "7", *asked("parts"), code=KILLED)
    assert status == 1 and said.count("\n") == 1
    assert "another process of this run is gone; go on with `torchrun --nproc-per-node 2 -m fastlm resume" in said
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    status, out, said = run(2, "resume", tmp_path / "parts")
    assert (status, said) == (0, "") and "from step 7 of 12" in out and out.count("fastlm 0") == 1
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")
    best = [(tmp_path / name / "best" / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert best[0] == best[1]
    assert command("resume", str(tmp_path / "alone")).returncode == 0
    alone, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "whole"))
    assert alone.keys() == whole.keys()

"""What training on several processes costs on this machine, a model of that, and what the model's terms say elsewhere.

    python benchmarks/scale.py [--worlds 1 2 3 4] [--rounds 20] [--out scale.json] [--smoke]

Measured, by torchrun with gloo and one thread a process: collectives of several sizes, and a whole update under each of
--shard's four ways, as many rows to each process. A time is the slowest rank's, the median of all rounds. Fitted:

    collective = crowd · (latency · hops + bytes sent / bandwidth)      crowd = max(1, processes / cores)
    update     = that of as many processes at once that share nothing + its collectives

Nothing hides the collectives, for a core either computes or sends; more processes than cores compute in turns. A ring
sends (n - 1)/n of a tensor in n - 1 hops to gather or to scatter it, twice that to reduce it for all. What is printed
for GPUs is arithmetic from published rates, and measured nowhere.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout built in place, unless fastlm is installed

from fastlm.models import ModelConfig, Transformer
from fastlm.optim import OPTIMIZERS
from fastlm.trainer.distributed.ranks import Ranks
from fastlm.trainer.distributed.shards import Division, bytes_each
from fastlm.trainer.options.training import SHARDS

SIZES = tuple(4**i for i in range(5, 12))  # numbers in fp32, 4 KiB to 16 MiB
ROWS, LENGTH = 2, 256  # of each process
# collectives of an update: how often all parameters, or all gradients, are gathered, scattered and reduced for all
VOLUMES = {
    "none": {"all_reduce": 1},
    "optimizer": {"all_reduce": 1, "all_gather": 1},  # ZeroRedundancyOptimizer sends each rank's parameters to all
    "gradients": {"all_gather": 1, "reduce_scatter": 1},
    "parameters": {"all_gather": 2, "reduce_scatter": 1},
}
ALONE = "alone"  # as many processes at once, each with a model of its own
HOPS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # times n - 1; and the share sent, times (n - 1)/n

# ---------------------------------------------------------------------------------------------------------------------
# Measured, on each process


def slowest(seconds: list[float]) -> float:
    """The median of rounds, each as long as for its slowest rank."""
    times = torch.tensor(seconds)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return statistics.median(times.tolist())


def rounds_of(call: Callable[[], object], rounds: int) -> float:
    seconds = []
    for i in range(rounds + 2):
        dist.barrier()
        begin = time.perf_counter()
        call()
        if i >= 2:
            seconds.append(time.perf_counter() - begin)
    return slowest(seconds)


def collectives(world: int, sizes: tuple[int, ...], rounds: int) -> list[dict]:
    found = []
    for size in sizes if world > 1 else ():
        n = size // world * world
        whole, part = torch.zeros(n), torch.zeros(n // world)
        calls = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
        }
        found += [
            dict(what=what, bytes=4 * n, world=world, seconds=rounds_of(call, rounds)) for what, call in calls.items()
        ]
    return found


def update_of(shard: str, ranks: Ranks, dim: int, layers: int) -> tuple[Callable[[], None], int]:
    """One update of a small Llama, as the trainer makes it, and the number of its parameters."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=1024, dim=dim, heads=dim // 64, layers=layers, context=LENGTH))
    count = model.parameter_count()
    division = Division(model, shard, ranks)
    optimizer = division.optimizer(OPTIMIZERS["adamw"], [{"params": list(model.parameters())}], lr=1e-4)
    tokens = torch.randint(1024, (ROWS, LENGTH), generator=torch.Generator().manual_seed(ranks.rank))
    loss = lambda model, x: torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def update() -> None:
        optimizer.zero_grad()
        with division.adding_up(True):
            division.ask(loss, model, tokens).backward()
        optimizer.step()

    return update, count


def measure(out: Path, rounds: int, smoke: bool) -> None:
    """What torchrun starts: the measurements of one number of processes, written by the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    found = {"collectives": collectives(ranks.world, SIZES[:3] if smoke else SIZES, rounds), "updates": []}
    for shard in (ALONE, *SHARDS) if ranks.world > 1 else (ALONE,):
        shared = Ranks() if shard == ALONE else ranks
        update, parameters = update_of("none" if shard == ALONE else shard, shared, *((64, 2) if smoke else (256, 4)))
        seconds = rounds_of(update, rounds)
        found["updates"].append(dict(shard=shard, world=ranks.world, seconds=seconds, parameters=parameters))
    if ranks.speaks:
        out.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # DDP's and gloo's threads are not waited for


def started(world: int, options: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}  # of names, and of what DDP looks for
        subprocess.run([*command, __file__, "--measure", str(out), *options], check=True, env=env)
        return json.loads(out.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The model


def crowd(world: int) -> float:
    return max(1.0, world / len(os.sched_getaffinity(0)))


def sent(what: str, size: int, world: int) -> tuple[int, float]:
    """Hops of a ring, and bytes that each rank sends."""
    return HOPS[what] * (world - 1), HOPS[what] * size * (world - 1) / world


def fitted(measured: list[dict]) -> tuple[float, float]:
    """(latency of a hop in seconds, bandwidth in bytes a second) with the least squares of relative errors."""
    rows = []
    for x in measured:
        hops, size = sent(x["what"], x["bytes"], x["world"])
        rows.append([crowd(x["world"]) * hops / x["seconds"], crowd(x["world"]) * size / x["seconds"]])
    a = torch.tensor(rows, dtype=torch.float64)
    latency, per_byte = torch.linalg.lstsq(a, torch.ones(len(a), 1, dtype=torch.float64)).solution.flatten().tolist()
    return latency, 1 / per_byte


def collective(what: str, size: int, world: int, latency: float, bandwidth: float) -> float:
    hops, bytes_sent = sent(what, size, world)
    return crowd(world) * (latency * hops + bytes_sent / bandwidth)


def predicted(x: dict, alone: float, latency: float, bandwidth: float) -> float:
    """An update's seconds, from those of as many processes that share nothing."""
    volumes, size = VOLUMES.get(x["shard"], {}), 4 * x["parameters"]
    return alone + sum(n * collective(what, size, x["world"], latency, bandwidth) for what, n in volumes.items())


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic

# NVIDIA's H100 SXM data sheet: 989 TFLOP/s of dense bf16 (1,979 with sparsity), NVLink 900 GB/s in both directions.
# DGX H100's: a network adapter of 400 Gb/s for each GPU. 46.2 % of peak: Chowdhery et al. 2022, PaLM 540B.
FLOPS, USED, NVLINK, NETWORK, NODE = 989e12, 0.462, 450e9, 50e9, 8
MODELS = {"1.3B": (1.3e9, 1e6), "13B": (13e9, 2e6)}  # parameters, tokens of a batch: Brown et al. 2020, table 2.1


def arithmetic(world: int, parameters: float, tokens: float) -> list[dict]:
    """For each way to divide: GB of states on a GPU, seconds of computing and of sending in an update. fp32 parameters,
    gradients and two moments, as the trainer has them; 6 operations a parameter and token (Kaplan et al. 2020).
    """
    computing = 6 * parameters * tokens / (world * FLOPS * USED)
    bandwidth = NVLINK if world <= NODE else NETWORK
    memory = bytes_each(int(4 * parameters), int(4 * parameters), int(8 * parameters), world)
    rows = []
    for shard, volumes in VOLUMES.items():
        sending = sum(n * sent(what, int(4 * parameters), world)[1] for what, n in volumes.items()) / bandwidth
        rows.append(dict(shard=shard, gigabytes=memory[shard] / 1e9, computing=computing, sending=sending))
    return rows


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4])
    ask.add_argument("--rounds", type=int, default=20)
    ask.add_argument("--out", type=Path)
    ask.add_argument("--smoke", action="store_true", help="tiny sizes")
    ask.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.measure:
        measure(asked.measure, asked.rounds, asked.smoke)
    options = ["--rounds", str(asked.rounds), *(["--smoke"] if asked.smoke else [])]
    runs = [started(world, options) for world in asked.worlds]
    collectives, updates = ([x for run in runs for x in run[kind]] for kind in ("collectives", "updates"))
    latency, bandwidth = fitted(collectives)
    alone = {x["world"]: x["seconds"] for x in updates if x["shard"] == ALONE}
    for x in collectives:
        x["model"] = collective(x["what"], x["bytes"], x["world"], latency, bandwidth)
    for x in updates:
        x["model"] = predicted(x, alone[x["world"]], latency, bandwidth)
    off = lambda found: statistics.median(abs(x["model"] / x["seconds"] - 1) for x in found)
    print(f"{len(os.sched_getaffinity(0))} cores; a hop {1e6 * latency:.0f} µs, {bandwidth / 1e9:.2f} GB/s")
    shared = [x for x in updates if x["shard"] != ALONE]
    print(f"median error of the model: collectives {off(collectives):.0%}, updates {off(shared):.0%}")
    print("\n| processes | --shard | measured, ms | model, ms |\n|--:|---|--:|--:|")
    for x in updates:
        print(f"| {x['world']} | {x['shard']} | {1e3 * x['seconds']:.0f} | {1e3 * x['model']:.0f} |")
    print("\nArithmetic, measured nowhere:\n")
    print("| model | GPUs | --shard | GB each | computing, ms | sending, ms |\n|---|--:|---|--:|--:|--:|")
    beyond = {}
    for name, sizes in MODELS.items():
        for world in (8, 64, 1024):
            beyond[f"{name} on {world}"] = rows = arithmetic(world, *sizes)
            for x in rows:
                cells = f"{x['gigabytes']:.2f} | {1e3 * x['computing']:,.0f} | {1e3 * x['sending']:,.0f}"
                print(f"| {name} | {world:,} | {x['shard']} | {cells} |")
    if asked.out:
        made = dict(latency=latency, bandwidth=bandwidth, collectives=collectives, updates=updates, arithmetic=beyond)
        asked.out.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()

"""Rehearse the four calls of run.py where there is no GPU: how much each block compiles, and whether it fits its time.

    python benchmarks/gpu/rehearse.py [--out FILE]

Kernels are counted on a driver that launches nothing: the tests run on it and ask for theirs (tests/support/asked.py),
and the launchers ask for what the blocks will time. FlexAttention's are counted by what its compiler would try. Of
seconds a compilation is taken to cost COMPILE; the rest are the assumptions below.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plan import (
    HERE,
    LIMITS,
    PROCESSES,
    ROOT,
    TILES,
    TOTAL,
    TUNED_LENGTH,
    Block,
    attention_problems,
    calls,
    loss_problems,
    tile_problems,
)

# seconds
COMPILE = 2.0  # of one kernel
START = 15.0  # of a process: Python, torch, the first call of CUDA
BUILD = 60.0  # of the extensions, from nothing: 10 to 19 s were measured on two cores
TEST = 0.5  # of one test, when its kernels are there
SET_UP = 2.0  # of what is compared: inputs, the check in fp64, buffers
TRACE = 3.0  # of one torch.compile before and after its kernels
TRY = 0.3  # of one choice of max-autotune
BATCH = 0.02  # of work between two readings of a clock (timing.py)
WORKERS = 16  # that compile what max-autotune tries
FLEX = 3  # kernels of FlexAttention: forward, backward, and what sums a table's gradient
LOSS_KERNELS = 1 + 1 + 4  # ours; Liger's; of what is compiled of PyTorch's, forward and backward, as seen at one size
LOSS_RATE = 2e14  # operations a second of the slowest, of a card that multiplies three times as fast
FLEX_TRIED = 7 + 29  # by max-autotune: forward, backward (torch/_inductor/template_heuristics/triton.py)

TESTS = ("triton", "logits_kernels")
CUDA = [str(ROOT / "tests" / "csrc" / name) for name in ("test_cuda.py", "test_cuda_attention.py")]  # compile nothing

ASSUMED = ("COMPILE", "START", "BUILD", "TEST", "SET_UP", "TRACE", "TRY", "BATCH")


def tests() -> tuple[int, float]:
    """(kernels, seconds): the most that one of the processes has to compile, and all it does."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.json"
        path = os.pathsep.join((os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests" / "support")))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "asked", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, *(str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in TESTS)],
            env=os.environ | {"FASTLM_ASKED": str(asked), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=False,  # what was not computed is not right
        )
        by_test = list(json.loads(asked.read_text()).values())
    most = max(len({kernel for kernels in by_test[i::PROCESSES] for kernel in kernels}) for i in range(PROCESSES))
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *CUDA],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout.count("::")  # fmt: skip
    return most, START + COMPILE * most + TEST * (len(by_test) + collected) / PROCESSES


def ahead(what: str) -> tuple[int, float]:
    """The same of what is compiled ahead."""
    by_item = asked_ahead(what)
    most = max(sum(by_item[i::PROCESSES]) for i in range(PROCESSES))
    traced = 0 if what == "tiles" else TRACE * -(-len(attention_problems()) // PROCESSES)
    return most, START + COMPILE * most + traced


def asked_ahead(what: str) -> list[int]:
    """How many kernels each item of ahead.py compiles."""
    import ahead
    import resources
    import torch
    from triton import knobs

    found: list[set] = []
    knobs.runtime.jit_cache_hook = lambda key, fn, **_: found[-1].add((fn.name, key)) or True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    resources.driver.reset_active = lambda: None
    counts = []
    for name, run in ahead.items(what):
        found.append(set())
        if name.startswith("FlexAttention"):
            counts.append(FLEX)
        else:
            run()
            counts.append(len(found[-1]))
    return counts


def compared(contestants: int) -> float:
    """Seconds of one comparison: warming up, then rounds of all and of ours a second time."""
    return BATCH * (contestants + 1) * (2 + LIMITS["rounds"])


def attention() -> tuple[int, float]:
    """Ours are compiled ahead; FlexAttention is traced anew, and tuned at one length."""
    tuned = sum(problem.L == TUNED_LENGTH and problem.scheme != "none" for problem in attention_problems())
    seconds = START + tuned * (TRACE + FLEX_TRIED * (COMPILE / WORKERS + TRY))
    for problem in attention_problems():
        contestants = 6 if problem.scheme == "none" else 8
        seconds += SET_UP + TRACE + 2 * compared(contestants)
    return tuned * FLEX_TRIED, seconds


def optimizers() -> tuple[int, float]:
    import adamw
    import optim
    from shapes import PARAMETERS

    fields = [2 for _ in adamw.BYTES] + [len(who) for kind, (_, who) in optim.STEPS.items() if kind != "libraries"]
    return 0, START + len(PARAMETERS) * sum(2 * (SET_UP + compared(n)) for n in fields)  # by two clocks


def tiles() -> tuple[int, float]:
    return 0, START + sum(SET_UP + compared(1 + len(TILES[kernel][problem.D])) for kernel, problem in tile_problems())


def loss() -> tuple[int, float]:
    seconds, problems = START, loss_problems()
    for problem in problems:
        once = max(BATCH, problem.flops / problem.targets / LOSS_RATE) / BATCH
        seconds += 2 * SET_UP + LOSS_KERNELS * COMPILE + TRACE + 2 * once * compared(4)  # by two clocks
    return len(problems) * LOSS_KERNELS, seconds


def expected(call: str, block: Block) -> tuple[int, float]:
    of: dict[str, Callable[[], tuple[int, float]]] = {
        "build": lambda: (0, BUILD), "machine": lambda: (0, START + 3), "tests": tests, "attention": attention,
        "ahead": lambda: ahead("tiles" if call == "optimizers" else "attention"), "optimizers": optimizers,
        "tiles": tiles, "loss": loss,
    }  # fmt: skip
    return of[block.name]()


def main() -> int:
    parser = argparse.ArgumentParser(description="Count what the four calls of run.py compile and how long they take.")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    lines = [
        f"| call | block | processes | compilations of one, at {COMPILE:.0f} s | seconds | cap | share of the cap |",
        "|---|---|---|---|---|---|---|",
    ]
    fits = True
    arguments = parser.parse_args()
    for call, blocks in calls(HERE, smoke=False).items():
        total = 0.0
        for block in blocks:
            compilations, seconds = expected(call, block)
            total += seconds
            share = seconds / block.cap
            fits &= share <= 0.75
            lines.append(
                f"| {call} | {block.name} | {len(block.commands)} | {compilations} | {seconds:.0f} | {block.cap} "
                f"| {100 * share:.0f} % |"
            )
        caps = sum(block.cap for block in blocks)
        fits &= caps <= TOTAL
        lines.append(f"| {call} | all | | | {total:.0f} | {caps} of {TOTAL} | {100 * total / TOTAL:.0f} % |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.out:
        assumed = ", ".join(f"{name.lower()} {globals()[name]}" for name in ASSUMED)
        arguments.out.write_text(f"{__doc__.splitlines()[0]}\n\n{table}\nAssumed, in seconds: {assumed}.\n")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that needs a GPU, in one command of under ten minutes:

    python benchmarks/gpu/run.py [--out FOLDER] [--smoke]

builds the extensions in place, runs the GPU tests, measures the machine, times the optimizers and attention, and prints
one table. FOLDER, else $OUT, else benchmarks/results, receives results.jsonl, report.md, plots and a log for each
block. Blocks are processes with a time cap each: one that fails or is cut short leaves the others alone. --smoke: tiny
sizes on whatever device there is, to try it all.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402

TOTAL = 570  # seconds
TESTERS = 12  # processes that share the tests, most of whose time goes into compiling kernels


@dataclass(frozen=True)
class Block:
    """Commands that run beside one another, within `cap` seconds; `tail` lines of each one's log are shown."""

    name: str
    cap: int
    commands: list[list[str]]
    tail: int


def plan(out: Path, smoke: bool) -> list[Block]:
    """In order of worth: what cannot be had anywhere but on a GPU comes before what a plot would be nicer with."""
    python, blocks = sys.executable, str(ROOT / "benchmarks" / "gpu" / "blocks.py")
    tests = [
        str(ROOT / "tests" / name)
        for name in ("csrc/test_cuda.py", "kernels/test_triton.py")
        if (ROOT / "tests" / name).exists()
    ]
    extra = ["--smoke"] * smoke
    timed = lambda name, cap, tail: Block(name, cap, [[python, blocks, name, str(out), str(cap - 15), *extra]], tail)
    build = Block("build", 90, [[python, "setup.py", "build_ext", "--inplace"]], 3)
    pytest = [python, "-m", "pytest", "-q", "--maxfail=4", "-p", "no:cacheprovider", *tests]
    # their time is the compiler's
    check = Block("tests", 120, [[*pytest, "--part", f"{i}/{TESTERS}"] for i in range(TESTERS)], 6)
    measured = timed("attention", 200, 20), timed("adamw", 80, 10), timed("optim", 100, 20)
    return [*([] if smoke else [build]), timed("machine", 60, 20), *([] if smoke else [check]), *measured]


def run(block: Block, logs: list[Path], cap: float) -> str:
    """Run its commands with their output in `logs`; return how it went. Their whole process groups end with it."""
    begin = time.monotonic()
    processes = []
    for command, log in zip(block.commands, logs, strict=True):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
                )
            )
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, begin + cap - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            codes.append(None)
    failed = [code for code in codes if code]
    how = f"CUT at its {cap:.0f} s" if None in codes else f"FAILED with code {failed[0]}" if failed else "done"
    return f"{how} in {time.monotonic() - begin:.0f} s"


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too; neither builds nor tests")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    results.unlink(missing_ok=True)
    end, good = time.monotonic() + TOTAL, True
    for block in plan(arguments.out, arguments.smoke):
        left = end - time.monotonic()
        logs = [
            arguments.out / f"{block.name}{f'-{i}' if len(block.commands) > 1 else ''}.log"
            for i in range(len(block.commands))
        ]
        how = run(block, logs, min(block.cap, left)) if left > 5 else "SKIPPED: no time left"
        good &= how.startswith("done")
        print(
            f"\n== {block.name}: {how}",
            *(line for log in logs if log.exists() for line in log.read_text().splitlines()[-block.tail :]),
            sep="\n",
            flush=True,
        )
    rows = report.load([results]) if results.exists() else []
    (arguments.out / "report.md").write_text(report.markdown(rows))
    print(report.markdown(rows))
    if rows:
        report.draw(rows, arguments.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

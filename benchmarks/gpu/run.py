"""Everything that needs a GPU, in four calls of under ten minutes, each complete by itself:

    python benchmarks/gpu/run.py correctness    the GPU tests
    python benchmarks/gpu/run.py attention      attention against PyTorch's and FlexAttention
    python benchmarks/gpu/run.py optimizers     optimizers against torch's, then attention's tiles against others
    python benchmarks/gpu/run.py loss           linear cross entropy against PyTorch's, compiled too, and Liger's

Each builds the extensions in place, measures the machine, and prints one table. --out FOLDER, else $OUT, else
benchmarks/results, receives a folder of the call's name: results.jsonl, report.md, plots and a log for each block.
Blocks (plan.py) are processes with a time cap each: one that fails or is cut short leaves the others alone, and one
that is cut short is asked to stop before it is ended, so that it says what it knows. --smoke: tiny sizes on whatever
device there is, to try it all.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report
from plan import GRACE, ROOT, TOTAL, Block, calls


def run(block: Block, logs: list[Path], cap: float) -> str:
    """Run its commands with their output in `logs`; return how it went. Their whole process groups end with it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; children would be deaf too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.monotonic()
    processes = []
    for command, log in zip(block.commands, logs, strict=True):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
                )
            )
    late = wait(processes, begin + cap - GRACE)
    for process in late:
        os.killpg(process.pid, signal.SIGINT)
    for process in wait(late, begin + cap):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    failed = [process.returncode for process in processes if process.returncode and process not in late]
    how = f"CUT at its {cap:.0f} s" if late else f"FAILED with code {failed[0]}" if failed else "done"
    return f"{how} in {time.monotonic() - begin:.0f} s"


def wait(processes: list[subprocess.Popen], until: float) -> list[subprocess.Popen]:
    """Those that have not ended by then."""
    late = []
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(process)
    return late


def environment() -> dict[str, str]:
    """One OpenMP thread for each of the processes that share the machine."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def missing() -> str | None:
    """Why an extension was not built, and the cure. Without it a block would time the definitions."""
    built = json.loads((ROOT / "fastlm" / "build.json").read_text())
    return next(
        (f"_{name} was not built: {x['why']}; cure: {x['cure']}" for name, x in built.items() if not x["built"]), None
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build, test and measure on a GPU, in four calls.", epilog="See the top of this file."
    )
    parser.add_argument("call", choices=list(calls(Path(), False)))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too; neither builds nor tests")
    arguments = parser.parse_args()
    out = arguments.out / arguments.call
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    results.unlink(missing_ok=True)
    end, good = time.monotonic() + TOTAL, True
    for block in calls(out, arguments.smoke)[arguments.call]:
        left = end - time.monotonic()
        many = len(block.commands) > 1
        logs = [out / f"{block.name}{f'-{i}' if many else ''}.log" for i in range(len(block.commands))]
        how = run(block, logs, min(block.cap, left)) if left > 2 * GRACE else "SKIPPED: no time left"
        good &= how.startswith("done")
        lines = (line for log in logs if log.exists() for line in log.read_text().splitlines()[-block.tail :])
        print(f"\n== {block.name}: {how}", *lines, sep="\n", flush=True)
        if block.name == "build" and (why := missing()):
            print(f"stopped: {why}")
            return 1
    rows = report.load([results]) if results.exists() else []
    (out / "report.md").write_text(report.markdown(rows))
    print(report.markdown(rows))
    if rows:
        report.draw(rows, out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

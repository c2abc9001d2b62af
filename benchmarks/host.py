"""What a call of attention costs the host: the launchers' own time, forward and backward, where nothing is launched.

    python benchmarks/host.py

Process time of one thread on a driver that stands for a GPU (benchmarks/resources.py), so no kernel, no operator of
torch.library and no autograd is in it; results stay unwritten.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout built in place, unless fastlm is installed
import resources

from fastlm.kernels import attention, attention_backward
from fastlm.ops.attention import LEARNED, Arguments

B, H, L, D = 2, 8, 1024, 64
ROUNDS = 400


def microseconds(call: Callable[[], object]) -> float:
    """Median of the process's own time."""
    times = []
    for _ in range(ROUNDS + 20):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return 1e6 * statistics.median(times[20:])


def main() -> None:
    torch.set_num_threads(1)
    resources.PaperGPU._load = lambda *_: (1, 1, 0, 0, 1024)  # a module that counts as loaded
    resources.driver.set_active(resources.PaperGPU(90))
    q, k, v = (torch.zeros(B, H, L, D, dtype=torch.bfloat16) for _ in range(3))
    for name, table in (("no position", None), ("T5's table", torch.zeros(H, 2 * L - 1))):
        a = Arguments.of(q, k, v, right=0, table=table)
        out, lse = attention.forward(a)
        wanted = {name for name in LEARNED if getattr(a, name) is not None}
        backward = lambda a=a, out=out, lse=lse, wanted=wanted: attention_backward.backward(
            out, None, out, lse, a, wanted
        )
        forward = microseconds(lambda a=a: attention.forward(a))
        print(f"{name}: forward {forward:.0f} µs, backward {microseconds(backward):.0f} µs")


if __name__ == "__main__":
    main()

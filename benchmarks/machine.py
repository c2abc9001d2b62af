"""What is being measured on: names and versions, and the two rates that bound every kernel, taken in the same run."""

import ctypes
import gc
import os
import platform
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import torch
from timing import between_events, clock

ROOT = Path(__file__).resolve().parents[1]


def describe(device: torch.device) -> dict[str, str]:
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "commit": output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "nvcc": output("nvcc", "--version").rpartition("\n")[2],
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "not installed"
    if device.type == "cuda":
        facts["cuda"], facts["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
        facts["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["clocks"] = clocks()
    return facts


def clocks() -> str:
    """SM and memory clock as they are; nothing here sets them."""
    return output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader")


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} not found"
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"{command[0]} failed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def peak_growth(work) -> int | None:
    """Bytes by which the process's resident memory grows at most while work runs, what was freed before having gone
    back to the system; None where Linux's /proc and the GNU C library are not there to tell.
    """
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK) or platform.libc_ver()[0] != "glibc":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, which it has now, or VmHWM, the most that it had."""
    return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def rate(work, amount: float, device: torch.device) -> float:
    """Median of ten: amount per second. What is compared with it is a median too."""
    work(), work()
    once = (lambda: between_events(work)) if device.type == "cuda" else clock([work])
    return amount / statistics.median(once() for _ in range(10))


def copy_rate(device: torch.device, size: int = 2**30) -> float:
    """Bytes per second of a large copy, read and written bytes both counted."""
    source, target = (
        torch.randint(256, (size,), dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    return rate(lambda: target.copy_(source), 2 * size, device)


def matmul_rate(device: torch.device, n: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of an n×n×n product of random matrices; zeros would run faster."""
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    c = torch.empty_like(a)
    return rate(lambda: torch.mm(a, b, out=c), 2 * n**3, device)

"""`fastlm info`: versions, devices, instruction sets, which backend each op takes on each device, and what is missing.

Needs torch alone. Lines are a label and its parts; the command line prints them.
"""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastlm.backends import dispatch, native

EXTRA = ("numpy", "tokenizers", "safetensors", "tyro", "matplotlib", "transformers")


def describe() -> Iterator[tuple[str, ...]]:
    """All of it, line by line."""
    yield "python", platform.python_version(), platform.platform(terse=True)
    threads = torch.get_num_threads()
    yield "torch", torch.__version__, f"{threads} thread{'s' * (threads != 1)}"
    yield "triton", _version("triton") or "not installed; CUDA builds of torch bring it"
    yield "extra", *(f"{name} {_version(name) or 'missing'}" for name in EXTRA)
    if any(_version(name) is None for name in EXTRA[:-1]):
        yield "cure", "pip install 'fastlm[train]' brings what pretraining needs"
    for device in devices():
        yield "device", device_name(device)
    if native.cpp_missing(torch.device("cpu")) is None:
        yield "cpu", f"instruction sets {', '.join(native.cpu().available())}", f"in use {native.cpu().active()}"
    for name, built in native.build_report().items():
        detail = built.get("compiler", "") if built["built"] else f"{built['why']}; cure: {built['cure']}"
        yield "build", f"{name} {'built' if built['built'] else 'not built'}", *([detail] if detail else [])
    if not native.build_report():
        yield "build", f"nothing was compiled; cure: {native.REBUILD}"
    yield from describe_ops()


def describe_ops() -> Iterator[tuple[str, ...]]:
    """For each device: the backends of each op that was imported, in the order they are tried, and below them why the
    others are not there.

    Raises BackendError if FASTLM_BACKEND names a backend that no op has.
    """
    forced = os.environ.get("FASTLM_BACKEND")
    with dispatch.use_backend(forced or None):
        pass  # it was only asked whether some op has it
    for device in devices():
        reasons: dict[str, str] = {}
        for name, op in sorted(dispatch.OPS.items()):
            rows = op.explain(device)
            reasons |= {backend: reason for backend, reason in rows if reason is not None}
            chosen = " → ".join(backend for backend, reason in rows if reason is None)
            if forced:
                chosen = (
                    f"{forced} (forced by FASTLM_BACKEND)"
                    if forced in op.names()
                    else f"no {forced}, which FASTLM_BACKEND forces: calls fail"
                )
            yield device.type, f"{name:<20} {chosen}"
        for backend, reason in reasons.items():
            yield "", f"{backend}: {reason}"


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def device_name(device: torch.device) -> str:
    """The device's type and what its maker calls it."""
    if device.type == "cpu":
        return f"cpu ({_processor()})"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

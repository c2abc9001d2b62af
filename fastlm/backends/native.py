"""What this machine can run beneath the definitions: the compiled extensions and Triton; and if one is missing, why and
the cure.

The extensions know no torch: they take addresses, counts, strides, a stream or a thread count. `build.json`, written by
setup.py, remembers what was built and what stood in the way.
"""

import functools
import importlib
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/rules/numeric.h
REBUILD = "reinstall with `pip install .` (in a checkout: `python setup.py build_ext --inplace`)"


@functools.cache
def build_report() -> dict:
    """What setup.py wrote: {"cpu": {"built": bool, "why": str}, "cuda": {...}}; empty if nothing was ever built."""
    path = Path(__file__).parents[1] / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _extension(name: str) -> ModuleType | str:
    """The extension fastlm._cpu or fastlm._cuda, or the reason it is not there."""
    report = build_report().get(name, {})
    if not report.get("built"):
        return f"{report.get('why', 'the extensions were not built')}; cure: {report.get('cure', REBUILD)}"
    try:
        module = importlib.import_module(f"fastlm._{name}")
    except ImportError as error:
        return f"fastlm._{name} was built but does not load ({error}); cure: {REBUILD}"
    if name == "cpu" and os.environ.get("FASTLM_ISA"):
        module.use(os.environ["FASTLM_ISA"])  # ValueError, naming what there is, if the processor lacks it
    return module


def cpu() -> ModuleType:
    """The C++ extension. Call only where `cpp_missing` said None."""
    module = _extension("cpu")
    assert not isinstance(module, str), module
    return module


def cuda() -> ModuleType:
    """The CUDA extension. Call only where `cuda_missing` said None."""
    module = _extension("cuda")
    assert not isinstance(module, str), module
    return module


def cpp_missing(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ backend computes on CPU tensors, and these are on {device.type}"
    module = _extension("cpu")
    return module if isinstance(module, str) else None


def cpp_is_built() -> bool:
    return cpp_missing(torch.device("cpu")) is None


def cpp_multiplies_bf16() -> bool:
    """Whether the instruction set in use multiplies pairs of bf16."""
    return cpp_is_built() and cpu().active() in ("avx512_bf16", "amx")


# torch.compiler.assume_constant_result, which would import Dynamo, and so Triton, with fastlm
cpp_is_built._dynamo_marked_constant = cpp_multiplies_bf16._dynamo_marked_constant = True


def cuda_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the CUDA backend computes on CUDA tensors, and these are on {device.type}"
    module = _extension("cuda")
    return module if isinstance(module, str) else None


def triton_missing(device: torch.device) -> str | None:
    """Triton serves CUDA (and ROCm) tensors; under TRITON_INTERPRET=1, when asked by name, CPU tensors too."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; cure: pip install triton"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return (
        f"Triton compiles for GPUs, and these tensors are on {device.type}; "
        "TRITON_INTERPRET=1 runs its interpreter, for tests"
    )


def view(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """(address, shape, strides in elements): a tensor as launchers take it. It must outlive the call."""
    return x.data_ptr(), x.shape, x.stride()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def named(**tensors: Tensor | None) -> dict[str, tuple[int, int]]:
    """(address, dtype number) of each dense tensor that is given, by its name."""
    return {name: (x.data_ptr(), DTYPES[x.dtype]) for name, x in tensors.items() if x is not None}


def side_by_side(x: Tensor) -> Tensor:
    """x itself if its last dimension lies side by side in memory, else a copy where it does."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def chunked(x: Tensor) -> Tensor:
    """x [B, H, L, D] itself if its rows lie side by side at multiples of 16 bytes, else a copy where they do."""
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def cuda_stream(device: torch.device) -> tuple[int, int]:
    """(device index, address of PyTorch's current stream there): where a CUDA launcher is to work."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def cuda_workspace(op: str, tensors: list[Tensor], sizes: list | None = None) -> Tensor:
    """Memory that the CUDA launcher of `op` asks for, for a list of tensors; it may be freed once the launch is queued.
    sizes: what the launcher wants to know of each, its number of elements unless given.
    """
    size = getattr(cuda(), f"{op}_workspace")([t.numel() for t in tensors] if sizes is None else sizes)
    return torch.empty(size, dtype=torch.uint8, device=tensors[0].device)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter; to be set before the first kernel module is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"

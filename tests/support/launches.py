"""Launch every Triton kernel through Triton's own launcher, on a driver that launches
nothing.

    TRITON_LIBCUDA_PATH=FOLDER python tests/support/launches.py    # FOLDER has csrc/on_host/libcuda.c as libcuda.so.1

Each launch must hand the driver what the kernel was called with, number by number: a launcher flattens terms that are
tuples in tuples, and leaves out what was compiled in. Prints the kernels' names; then, for calls of every length from
1000 to 1100 with ragged batches and heads, how often each kernel was compiled, as JSON.
"""

import ctypes
import json
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import resources

from fastlm.kernels import bias_gradient, distance_gradients, rotary

LIBCUDA = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
MOST = 256
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u8": 1, "u16": 2, "u32": 4, "u64": 8, "fp32": 4, "fp64": 8}
MOST_BLOCKS = (2**31 - 1, 65_535, 65_535)
LAUNCHED = set()
HEADS = ((8, 8), (8, 4), (12, 12), (16, 1), (1, 1))  # of queries, of keys
RAGGED = (None, "table", "bias of keys", "bias", "segments", "shaw")


def given(types, values) -> Iterator[tuple[str, object]]:
    """(type, value) of everything in the tuple of values that a kernel still takes once it is compiled."""
    if isinstance(types, (tuple, list)):
        assert len(types) == len(values), f"{len(values)} values for {types}"
        for pair in zip(types, values, strict=True):
            yield from given(*pair)
    elif types != "constexpr":
        yield types, values


def bits(kind: str, value) -> int:
    if kind.startswith("*"):
        return value.data_ptr()
    if kind.startswith("fp"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return int(value) % 2 ** (8 * SIZES[kind])


class Launcher(CudaLauncher):
    """Triton's, and a look at what came of it."""

    def __init__(self, source, metadata):
        super().__init__(source, metadata)
        self.name, self.types = metadata.name, list(source.signature.values())

    def __call__(self, *args):
        expected = [(kind, bits(kind, value)) for kind, value in given(self.types, args[-len(self.types) :])]
        ctypes.c_int.in_dll(LIBCUDA, "parameters").value = len(expected)
        (ctypes.c_int * MOST).in_dll(LIBCUDA, "sizes")[: len(expected)] = [SIZES.get(kind, 8) for kind, _ in expected]
        launches = ctypes.c_int.in_dll(LIBCUDA, "launches")
        before = launches.value
        super().__call__(*args)
        assert launches.value == before + 1, f"{self.name} was not launched"
        got = (ctypes.c_uint64 * MOST).in_dll(LIBCUDA, "values")
        for i, (kind, value) in enumerate(expected):
            assert got[i] == value, f"{self.name}: parameter {i}, {kind}, is {got[i]:x} instead of {value:x}"
        blocks = (ctypes.c_uint * 3).in_dll(LIBCUDA, "grid")
        assert all(1 <= n <= most for n, most in zip(blocks, MOST_BLOCKS, strict=True)), (
            f"{self.name}: a grid of {list(blocks)}"
        )
        LAUNCHED.add(self.name)


class Driver(CudaDriver):
    """Triton's, without torch.cuda."""

    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(Driver())
    resources.L, resources.empty = 256, torch.zeros  # with addresses, which tensors without storage lack
    x, angle = torch.zeros(2, 8, 256, 128), torch.zeros(256, 64)
    for _ in range(2):  # through Triton's own launcher, and as a launch that was seen before
        for term in (None, "table", *resources.FEW):
            resources.attention_case(torch.bfloat16, 64, term)()
        resources.decoding_case(torch.bfloat16, 64, "table")()
        rotary.rotate(x, angle, angle, "half")
        resources.norm_case(torch.bfloat16, 768)()
        resources.gate_case(torch.bfloat16, "silu")()
        resources.embedding_case(torch.bfloat16, 768)()
        resources.logits_case(torch.bfloat16, 1000, options=True)()
    print(*sorted(LAUNCHED))
    print(json.dumps(ragged_compilations()))


def ragged_compilations() -> dict[str, dict[str, int]]:
    """Term → kernel → how many times it is compiled over lengths, batches and heads that change from call to call."""
    compiled = Counter()
    knobs.runtime.jit_cache_hook = lambda fn, **_: compiled.update([fn.name.removesuffix("_kernel")])
    resources.empty = torch.empty  # nobody reads it
    counts = {}
    for term in RAGGED:
        for file in (resources.attention, resources.attention_backward, bias_gradient, distance_gradients):
            for kernel in vars(file).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
        for i, L in enumerate(range(1000, 1101)):
            resources.L, resources.B, (resources.H, resources.HK) = L, 1 + i % 4, HEADS[i % len(HEADS)]
            resources.attention_case(torch.bfloat16, 64, term)()
        counts[term or "plain"] = dict(compiled)
        compiled.clear()
    return counts


if __name__ == "__main__":
    main()

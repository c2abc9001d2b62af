"""The CUDA kernels of the list ops, compiled as C++ and run on the host, barriers, shuffles and all: against the C++
backend, which shares their rules.

What a GPU adds is speed, its memory model and its compiler's code; test_cuda.py asks the same there.
"""

import sys

import pytest
import torch
from bits import assert_same_bits, lists_of, tensors
from cases import OPTIMIZERS
from on_host import optimizers_and_all

from fastlm.backends import native
from fastlm.backends.dispatch import OPS, use_backend

# a fiber for every thread of a GPU is slow
CASES = [case for case in OPTIMIZERS if case.name.split("-")[-1] not in ("many", "several_groups")]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The module fastlm._cuda, for the host."""
    if native.cpp_missing(torch.device("cpu")):
        pytest.skip("the C++ extension to compare with is not built")
    return optimizers_and_all(tmp_path_factory.mktemp("on_host"))


def workspace(module, op: str, sizes: list) -> torch.Tensor:
    """What a launcher asks for, full of NaN."""
    return torch.full((getattr(module, f"{op}_workspace")(sizes),), 255, dtype=torch.uint8)


def step(module, case, dtype) -> tuple:
    """The case's arguments after the op's CUDA kernels."""
    args, op = case.make(dtype, torch.device("cpu")), OPS[case.op]
    memory = workspace(module, case.op, op.sizes(op.named(args)[0]))
    op.launch(module, args, (memory.data_ptr(), 0, 0))
    return args


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_agree_with_the_cpp_backend(on_host, case, dtype):
    """The same bits where a rule is elementwise; sums in another order cost LAMB and Adafactor an ulp or two, and the
    same bits again.
    """
    got, expected = step(on_host, case, dtype), case.make(dtype, torch.device("cpu"))
    with use_backend("cpp"):
        OPS[case.op](*expected)
    for x, y in zip(tensors(lists_of(got)), tensors(lists_of(expected)), strict=True):
        if case.op in ("adamw", "sgd"):
            assert_same_bits(x, y)
        elif x.dtype != torch.int16:
            ulp = torch.finfo(x.dtype).eps
            torch.testing.assert_close(x, y, rtol=4 * ulp, atol=4 * ulp)
    if case.op in ("lamb", "adafactor") and dtype == torch.float32:
        for x, y in zip(tensors(lists_of(got)), tensors(lists_of(step(on_host, case, dtype))), strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("bad", [0.0, torch.inf])
def test_gradients_are_read_as_the_cpp_backend_reads_them(on_host, bad):
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 16384, 100_003)]
    grads[3][50_000] += bad
    room, scale = sys.modules["fastlm.ops.optim.unscale"], torch.tensor(128.0)
    memory = workspace(on_host, "grad_stats", [g.numel() for g in grads])
    stats = room._grad_stats(on_host, grads, scale, 0.01, memory.data_ptr(), 0, 0)
    copies, flags = [g.clone() for g in grads], [torch.zeros(()), torch.zeros(())]
    room._unscale(on_host, grads, torch.tensor(0.3), flags[0], 0, 0)
    with use_backend("cpp"):
        torch.testing.assert_close(stats, OPS["grad_stats"](copies, scale, 0.01), rtol=1e-6, atol=0.0, equal_nan=True)
        OPS["unscale"](copies, torch.tensor(0.3), flags[1])
    assert flags[0] == flags[1] == (bad != 0)
    for x, y in zip(grads, copies, strict=True):
        assert_same_bits(x, y)

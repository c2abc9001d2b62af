"""The C++ extension: bounds at the launchers, instruction sets that do not leak into each other, and what a build
without a compiler says."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from building import ROOT, built

from fastlm.backends import native

CPU = torch.device("cpu")
F32 = 0


def logits(address=8, V=4):
    """The view of two rows of logits."""
    return address, (2, V), (4, 1)


def test_it_is_built_and_chosen():
    assert native.cpp_missing(CPU) is None, native.cpp_missing(CPU)
    assert native.cpu().active() in native.cpu().available()
    assert "portable" in native.cpu().available()


def test_it_says_where_it_cannot_compute():
    assert "these are on cuda" in native.cpp_missing(torch.device("cuda"))
    assert "these are on cpu" in native.cuda_missing(CPU)


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(ValueError, match="instruction set 'avx9' is not one this processor has; choose from"):
        native.cpu().use("avx9")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.unscale([(0, F32)], [4], 8, 8, 1), "null address"),
        (lambda m: m.unscale([(64, 9)], [4], 8, 8, 1), "dtype that is not"),
        (lambda m: m.unscale([(64, F32)], [-4], 8, 8, 1), "negative"),
        (lambda m: m.unscale([(64, F32)], [4, 5], 8, 8, 1), "1 tensors for 2 sizes"),
        (lambda m: m.unscale([], [], 0, 0, 1), "must be given"),
        (lambda m: m.grad_stats([], [], 0, 1.0, 0, 1), "stats is null"),
        (
            lambda m: m.adamw(
                m.Update([], [], [], [], [8], 0, 0), [], [], [], m.AdamOptions(0.1, 0.9, 0.9, 1e-8, 0.0, 1, True), 1
            ),
            "differ in number",
        ),
        (
            lambda m: m.sgd(
                m.Update([(8, F32)], [], [7], [(8, F32)], [8], 0, 0), [1], [], m.SgdOptions(0.1, 0, 0, 0, False), 1
            ),
            "for bf16 parameters",
        ),
        (
            lambda m: m.sgd(
                m.Update([(8, F32)], [(8, F32)], [], [(8, F32)], [8], 0, 0),
                [1],
                [],
                m.SgdOptions(0.1, 0, 0, 0, False),
                1,
            ),
            "fp32 of 16-bit",
        ),
        (
            lambda m: m.sgd(
                m.Update([(8, F32)], [], [], [(8, F32)], [0], 0, 0), [1], [], m.SgdOptions(0.1, 0, 0, 0, False), 1
            ),
            "steps holds a null",
        ),
        (
            lambda m: m.rotate(8, 8, F32, [1, 1, 1, 8], [8, 8, 8, 2], [8, 8, 8, 1], 8, 8, 0, 8, False, 1),
            "last stride must be 1",
        ),
        (lambda m: m.rotate(8, 8, F32, [1, 1, 1, 8], [8, 8, 8, 1], [8, 8, 8, 1], 8, 8, 0, 10, False, 1), "at most D"),
        (lambda m: m.rotate(0, 8, F32, [1, 1, 1, 8], [8, 8, 8, 1], [8, 8, 8, 1], 8, 8, 0, 8, False, 1), "null"),
        (lambda m: m.norm({"x": (8, F32)}, 8, True, 2, 4, 1e-5, 0.0, False, 1), "y must be given"),
        (
            lambda m: m.norm(dict.fromkeys(("x", "residual", "y"), (8, F32)), 8, True, 2, 4, 1e-5, 0.0, False, 1),
            "s must be given",
        ),
        (lambda m: m.norm({"x": (0, F32)}, 8, True, 2, 4, 1e-5, 0.0, False, 1), "x has a null address"),
        (lambda m: m.norm({"x": (8, 5)}, 8, True, 2, 4, 1e-5, 0.0, False, 1), "x has a dtype that is not"),
        (lambda m: m.norm({"x": (9, F32)}, 8, True, 2, 4, 1e-5, 0.0, False, 1), "not a multiple of its element's size"),
        (lambda m: m.norm({}, 0, True, 2, 4, 1e-5, 0.0, False, 1), "statistics must be given"),
        (lambda m: m.norm({}, 8, True, 2, 0, 1e-5, 0.0, False, 1), "rows must have 1 to"),
        (lambda m: m.norm_backward({}, 8, True, -2, 4, 0.0, 8, 8, 1), "a size is negative"),
        (lambda m: m.norm_backward({}, 8, True, 2, 4, 0.0, 8, 8, 1), "dy must be given"),
        (lambda m: m.gate({"x": (8, F32)}, 2, 4, 0, True, 1), "y must be given"),
        (lambda m: m.gate({"x": (8, F32), "y": (8, F32)}, 2, 4, 5, True, 1), "the activation's number is unknown"),
        (lambda m: m.gate({"x": (8, F32), "y": (8, F32)}, -2, 4, 0, True, 1), "a size is negative"),
        (lambda m: m.gate_backward({"x": (8, F32), "dy": (8, F32)}, 2, 4, 0, True, 1), "dx must be given"),
        (lambda m: m.linear({}, 9, 4, 4, 1), "at most 8 rows"),
        (lambda m: m.linear({}, 2, -4, 4, 1), "a size is negative"),
        (lambda m: m.linear({"y": (8, F32), "x": (8, F32)}, 2, 4, 4, 1), "weight must be given"),
        (lambda m: m.logits_measure((8, (2, 4), (3, 1)), F32, 0, 8, (8, 8), 4, (0.0, 1.0, 0.0), 1), "must not overlap"),
        (lambda m: m.logits_measure((8, (2, 4), (8, 2)), F32, 0, 8, (8, 8), 4, (0.0, 1.0, 0.0), 1), "side by side"),
        (lambda m: m.logits_lose(logits(), 5, 0, 8, 8, 4, (0.0, 1.0, 0.0), 0.0, 1), "x has a dtype that is not"),
        (lambda m: m.logits_lose(logits(), F32, 0, 8, 0, 4, (0.0, 1.0, 0.0), 0.0, 1), "an address is null"),
        (lambda m: m.logits_measure(logits(address=0), F32, 0, 8, (8, 8), 4, (0.0, 1.0, 0.0), 1), "an address is null"),
        (lambda m: m.logits_measure(logits(), F32, 0, 8, (8, 0), 4, (0.0, 1.0, 0.0), 1), "an address is null"),
        (lambda m: m.logits_measure(logits(V=0), F32, 0, 8, (8, 8), 4, (0.0, 1.0, 0.0), 1), "at least one logit"),
        (lambda m: m.logits_measure(logits(), F32, 0, 8, (8, 8), 3, (0.0, 1.0, 0.0), 1), "no more than words"),
        (
            lambda m: m.logits_gradient(logits(), F32, 0, 8, (8, 8, 8), 4, (0.0, 0.0, 0.0), 1),
            "temperature must be positive",
        ),
        (
            lambda m: m.logits_gradient(logits(), F32, 0, 8, (8, 8, 0), 4, (0.0, 1.0, 0.0), 1),
            "an address is null",
        ),
    ],
)
def test_launchers_check_what_they_are_given(call, message):
    with pytest.raises(ValueError, match=message):
        call(native.cpu())


def test_instruction_sets_share_no_code():
    """A weak symbol made by a file compiled for AVX-512 may be the copy the linker keeps for everyone."""
    objects = [p for p in (ROOT / "build").rglob("*.o") if re.search(r"\.(avx2|avx512\w*|amx)\.o$", p.name)]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of an in-place build, or no nm: run `python setup.py build_ext --inplace`")
    for path in objects:
        names = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        # but for the address of what unwinds the stack, which is data
        weak = [line for line in names.splitlines() if re.match(r"\S* *[WVu] (?!DW\.ref\.__gxx_personality)", line)]
        assert not weak, f"{path.name} defines {weak[:3]}"


def test_without_compilers_everything_runs_by_definition(tmp_path):
    lib = built(tmp_path, CC="/bin/false", CXX="/bin/false", CUDA_HOME="/nonexistent", CUDA_PATH="")
    report = json.loads((lib / "fastlm" / "build.json").read_text())
    assert not report["cpu"]["built"] and "no C++17 compiler that works (/bin/false)" in report["cpu"]["why"]
    assert not report["cuda"]["built"] and "nvcc was not found" in report["cuda"]["why"]
    code = """
import torch, fastlm
from fastlm.backends.dispatch import OPS
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
fastlm.optim.AdamW([p], max_grad_norm=1.0).step()
q = torch.randn(1, 2, 4, 8)
fastlm.attention(q, q, q, position=fastlm.positions.T5Bias(2), causal=True)
print(dict(OPS["adamw"].explain(torch.device("cpu")))["cpp"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(lib)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "no C++17 compiler that works" in done.stdout and "cure: install one" in done.stdout

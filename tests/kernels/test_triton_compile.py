"""Triton's kernels compiled for every architecture, without a GPU: benchmarks/resources.py, and what must hold of its
table.

Runs in a process of its own, because Triton compiles or interprets, never both; with the installed Triton, and, for
sm_90 alone, with Triton 3.6, the oldest that GPU machines carry, where FASTLM_TRITON_36 names a folder that holds it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# bytes a program may have; what serves sm_80 serves sm_86, sm_89 and sm_120 too
SHARED = {80: 101_376, 90: 232_448, 100: 232_448}
NO_TRITON_36 = "FASTLM_TRITON_36 is unset; pip install --no-deps --target FOLDER triton==3.6.0, and set it to FOLDER"


@pytest.fixture(scope="module", params=[("installed", 80, 90, 100), ("3.6", 90)], ids=lambda param: param[0])
def resources(request, tmp_path_factory) -> list[dict]:
    """The table that benchmarks/resources.py prints."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    version, *architectures = request.param
    path = [str(ROOT)]
    if version == "3.6":
        if "FASTLM_TRITON_36" not in os.environ:
            pytest.skip(NO_TRITON_36)
        path.insert(0, os.environ["FASTLM_TRITON_36"])
    file = tmp_path_factory.mktemp("resources") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(path)
    }
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "resources.py"), "--json", str(file)]
    command += ["--arch", *map(str, architectures)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(file.read_text())
    assert version == "installed" or table["triton"].startswith(version), table["triton"]
    assert {k["arch"] for k in table["kernels"]} == set(architectures)
    return table["kernels"]


KERNELS = {
    "forward",
    "dq",
    "dkdv",
    "distances",
    "distances_sum",
    "bias",
    "split",
    "merge",
    "rotate",
    "norm",
    "norm_backward",
    "gated",
    "gated_backward",
    "embedding_backward",
    "logits_measure",
    "logits_gradient",
    "logits_lose",
}


def test_every_kernel_compiles_everywhere(resources):
    for arch in {k["arch"] for k in resources}:
        assert {k["kernel"] for k in resources if k["arch"] == arch} == KERNELS


def test_shared_memory_fits(resources):
    for k in resources:
        assert k["shared"] <= SHARED[k["arch"]] and k["blocks"] >= 1, k


def test_registers_hold_everything(resources):
    """The forward in 16 bits and the small kernels spill nothing; in fp32, and norms' gradients of long rows, a word or
    two, by which the compiler fits a second program.

    Attention's backward kernels spill bytes by the hundred, mostly constants of their loops.
    """
    for k in resources:
        spares = k["kernel"] in (
            "distances_sum",
            "merge",
            "rotate",
            "norm",
            "gated",
            "gated_backward",
            "embedding_backward",
            "logits_measure",
            "logits_gradient",
            "logits_lose",
        ) or (k["kernel"] in ("forward", "split") and k["case"].startswith("bfloat16"))
        few = k["kernel"] in ("forward", "split", "norm_backward")
        assert k["spills"] <= (0 if spares else 16 if few else 512), k


def test_two_programs_share_a_multiprocessor(resources):
    """The forward at head size 64 on sm_90 keeps to 128 registers, so that one program's softmax overlaps another's
    products.
    """
    found = [
        k
        for k in resources
        if k["arch"] == 90 and k["kernel"] == "forward" and k["case"] in ("bfloat16 D=64", "bfloat16 D=64 table")
    ]
    assert len(found) == 2 and all(k["blocks"] >= 2 for k in found)


def test_16_bit_products_run_on_tensor_cores(resources):
    """HGMMA on sm_90 (warp-group products, not the older HMMA) where a tile has their 64 rows; and never in fp32, where
    TF32 would lose bits.

    A tile of 32 rows may have some too: it meets 64 distances.
    """
    for k in resources:
        if k["kernel"] in ("forward", "dq", "dkdv", "distances", "bias"):
            assert (k["tensor_core"] > 0) == k["case"].startswith("bfloat16"), k
            able = k["arch"] == 90 and k["case"].startswith("bfloat16")
            large = int(k["tile"].split("×")[0]) >= 64
            assert k["warp_group"] in ({able} if large else {able, False}), k


def test_a_table_takes_no_shared_memory(resources):
    """The table is read by distance through the cache; a pipelined gather would keep whole tiles of it."""
    shared = {(k["arch"], k["case"], k["kernel"]): k["shared"] for k in resources}
    for (arch, case, kernel), size in shared.items():
        if case.endswith(" table") and (arch, case.removesuffix(" table"), kernel) in shared:
            assert size <= shared[arch, case.removesuffix(" table"), kernel] + 512, (arch, case, kernel)

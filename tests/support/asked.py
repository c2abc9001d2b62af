"""pytest -p asked tests/kernels/test_triton.py: which kernels the tests would compile on a GPU, which is not there.

The tests run on a driver that launches nothing; instead of compiling, each kernel that is asked for is written down,
as is, at the end, {test: kernels} to the file that FASTLM_ASKED names. What they compute is not looked at.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from triton import knobs
from triton.runtime.driver import driver

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
asked: dict[str, list[str]] = {}


def pytest_configure(config):
    os.environ.pop("TRITON_INTERPRET", None)  # by conftest, where there is no GPU
    sys.path.insert(0, str(BENCHMARKS))
    import resources
    import tolerance

    from fastlm.backends.dispatch import OPS

    driver.set_active(resources.PaperGPU(90))
    for backend in (backend for op in OPS.values() for backend in op.backends if backend.name == "triton"):
        object.__setattr__(backend, "unavailable", lambda device: None)
    tolerance.yardstick = lambda args, grad: tolerance.Yardstick(dict.fromkeys(("lse",)), {})
    tolerance.assert_accurate = torch.testing.assert_close = lambda *args, **options: None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    kernels = asked.setdefault(item.name, [])

    def note(key, fn, **_):
        kernels.append(f"{fn.name} {key}")
        return True  # it is not compiled

    knobs.runtime.jit_cache_hook = note


def pytest_sessionfinish(session):
    found = {name: sorted(set(kernels)) for name, kernels in asked.items()}
    Path(os.environ["FASTLM_ASKED"]).write_text(json.dumps(found))

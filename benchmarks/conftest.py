"""`pytest benchmarks` checks, then times, on the machine it finds. --smoke: tiny sizes, to try the benchmarks
themselves.

`--benchmark-json FILE` keeps the results; `python benchmarks/report.py FILE` draws them. The time in pytest-benchmark's
own table is ours alone; the comparison, by the protocol of timing.py, is in each test's extra_info.
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout built in place, unless fastlm is installed
import machine


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="tiny sizes and two rounds")
    parser.addoption("--layers", type=int, help="of whole models, instead of their own number")


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def layers(request) -> int | None:
    return request.config.getoption("--layers")


@pytest.fixture(scope="session")
def limits(smoke) -> dict:
    """Arguments of timing.compare."""
    return {"rounds": 2, "budget": 1.0, "batch": 0.0} if smoke else {"rounds": 30, "budget": 20.0}


@pytest.fixture(scope="session")
def copy(smoke) -> float:
    return machine.copy_rate(torch.device("cpu"), 2**20 if smoke else 2**28)


@pytest.fixture(scope="session")
def matmul(smoke) -> Callable[[torch.dtype], float]:
    """Operations per second of torch.mm in a dtype, measured once in this run."""
    return cache(lambda dtype: machine.matmul_rate(torch.device("cpu"), 64 if smoke else 2048, dtype))


@pytest.fixture
def record(benchmark, limits):
    """record(row, ours): keep the comparison, and let pytest-benchmark time ours once more for its own table."""

    def keep(row: dict, ours) -> None:
        benchmark.extra_info.update(row | {"machine": machine.describe(torch.device("cpu"))})
        benchmark.pedantic(ours, rounds=min(5, limits["rounds"]), warmup_rounds=1)

    return keep

"""Fixtures that several test files use; which fastlm the tests' own processes import; where Triton's kernels run."""

import os
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.backends import native

# the package under test, be it installed or a checkout
os.environ["PYTHONPATH"] = str(Path(fastlm.__file__).parents[1])
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's interpreter; before anything imports a kernel


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        default="0/1",
        metavar="I/N",
        help="every N-th test, from the I-th on, so that N processes share a suite",
    )


def pytest_collection_modifyitems(config, items):
    i, n = map(int, config.getoption("--part").split("/"))
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % n != i])
    items[:] = items[i::n]


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """A text to train on (runs.write_text); the cache is the test's own."""
    from runs import write_text  # and with it the trainer, whose packages the library's tests do without

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    write_text(path, seed=0)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Python looks in the working directory first, and a checkout there may not be built."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def poisoned_cpp():
    """Attention by C++; results start as NaN, for torch fills empty tensors when it is asked to be deterministic."""
    torch.use_deterministic_algorithms(True)
    with fastlm.use_backend(attention="cpp", attention_backward="cpp"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Attention and rotation, forward and backward, by the definition and by C++ in turn."""
    if request.param == "cpp" and native.cpp_missing(torch.device("cpu")):
        pytest.skip(native.cpp_missing(torch.device("cpu")))
    with fastlm.use_backend(attention=request.param, attention_backward=request.param, rotate=request.param):
        yield request.param

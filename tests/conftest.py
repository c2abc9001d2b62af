"""Fixtures that several test files use; which fastlm the tests' own processes import; where Triton's kernels run; how
the suite is shared by the workers of `pytest -n`, and which of its files are slow.
"""

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each take all cores wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # here a plugin of pytest's may have imported torch

from ranks import every_rank as every_rank  # one set of processes for all tests that ask for ranks
from ranks import ranks as ranks

import fastlm
from fastlm.backends import native
from fastlm.ops import logits

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


# in the order of their time; left out by -m "not slow"
SLOW = [
    "kernels/test_triton_compile.py", "optim/test_sharded.py", "optim/test_sharded_models.py",
    "optim/test_sharded_checkpoints.py", "trainer/test_distributed.py", "csrc/test_sanitizers.py",
    "house/test_benchmarks.py", "interop/test_transformers_4.py", "kernels/test_triton.py",
    "trainer/test_finetune.py", "interop/swap/test_swap_families.py", "trainer/test_cli.py",
    "ops/test_transforms.py", "house/test_docs.py", "ops/test_attention_threads.py",
    "csrc/test_cuda_attention_on_host.py", "trainer/test_checkpoint.py", "trainer/test_presets.py",
    "nn/test_context_parallel.py", "trainer/test_interruptions.py", "trainer/test_memory.py",
    "csrc/test_cuda_on_host.py", "kernels/test_triton_launch.py", "optim/test_trainers.py",
    "trainer/test_trainer.py", "csrc/test_cuda_compile.py", "trainer/test_start.py", "house/test_readme.py",
    "trainer/test_reproduce.py", "trainer/test_pull.py", "models/test_transformer_xl.py", "house/test_examples.py",
    "ops/test_combinations.py", "ops/test_lesser_processors.py", "trainer/test_patience.py",
    "house/test_packaging.py", "house/test_types.py", "trainer/test_course.py",
]  # fmt: skip


def pytest_collection_modifyitems(config, items):
    i, n = map(int, config.getoption("--part").split("/"))
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % n != i])
    items[:] = items[i::n]
    for item in items:
        if " at 0x" in item.nodeid:  # another address in each worker of xdist, which then runs nothing
            raise pytest.UsageError(f"{item.nodeid} has an address in its name; give ids that are the same each time")
        if _file(item) in SLOW or item.get_closest_marker("sweep"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: SLOW.index(_file(item)) if _file(item) in SLOW else len(SLOW))


def _file(item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from sharing import Files  # who runs a few tests may have no xdist

    return Files(config, log)


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
def poisoned():
    """Results start as NaN, for torch fills empty tensors when it is asked to be deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned_cpp(poisoned):
    """Attention by C++; results start as NaN."""
    with fastlm.use_backend(attention="cpp", attention_backward="cpp"):
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> list[tuple[torch.dtype, torch.dtype]]:
    """The loss multiplies 16 bits as they are, and adds them up in fp32, for which a CPU has no product of its own.

    A list of the dtypes of what was multiplied, and of what it was added to.
    """
    addmm, seen = torch.addmm, []

    def added(to, x, y, out_dtype=None, out=None):
        seen.append((x.dtype, to.dtype))
        if out_dtype is None:
            return addmm(to, x, y, out=out)
        if to.device.type == "cuda":
            return addmm(to, x, y, out_dtype=out_dtype, out=out)
        return addmm(to, x.to(out_dtype), y.to(out_dtype), out=out)

    monkeypatch.setattr(logits, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch, "addmm", added)
    return seen


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

"""CUDA kernels without a GPU: what the compiler made of them for every target, and their logic on the host under
sanitizers.

Reads the library that setup.py built. A machine without nvcc skips what needs it; a build that failed where nvcc is
there is an error.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastlm.backends import native

TESTS = Path(__file__).parent
CUDA = torch.device("cuda")
TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")
KERNELS = (
    "ApplyAdamW",
    "ApplySgd",
    "ApplyMomentum",
    "LambMoments",
    "lamb_ratio",
    "LambApply",
    "advance",
    "Unscale",
    "SumOfSquares",
    "finish",
)
KERNELS += ("adafactor_measure", "adafactor_columns", "adafactor_finish", "adafactor_bounded", "adafactor_apply")


@pytest.fixture(scope="module")
def library() -> Path:
    why = native.cuda_missing(CUDA)
    if why is not None:
        (pytest.fail if shutil.which("nvcc") and native.build_report() else pytest.skip)(why)
    return Path(native.cuda().__file__)


def cuobjdump(*arguments) -> str:
    """The output of NVIDIA's cuobjdump: the toolkit's, or the one in Triton's package."""
    try:
        import triton.backends.nvidia as nvidia

        bundled = [str(Path(path) / "bin") for path in nvidia.__path__]
    except ImportError:
        bundled = []
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(bundled))
    if tool is None:
        pytest.skip("cuobjdump was found neither in PATH nor in Triton's package")
    return subprocess.run([tool, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


def test_no_kernel_spills(library):
    """Registers only, no stack, on every target; and few enough registers for three blocks on a processor, whose loads,
    up to 16 bytes of five lists for each of 768 threads, cover the wait for memory.
    """
    rows = re.findall(
        r"arch = (\w+)|Function (\w+):|REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", cuobjdump("-res-usage", library)
    )
    target = kernel = None
    seen = set()
    for arch, function, registers, stack, local in rows:
        target, kernel = arch or target, function or kernel
        if registers:
            seen |= {(target, name) for name in KERNELS if name in kernel}
            assert (stack, local) == ("0", "0"), (
                f"{kernel} for {target} uses {stack} bytes of stack and {local} of local memory"
            )
            assert int(registers) <= 80, f"{kernel} for {target} uses {registers} registers"
    assert seen >= {(target, name) for target in TARGETS for name in KERNELS}


def test_vector_loads_and_stores(library):
    """On sm_90a AdamW's loop has a 16-byte load for each of p, g, m, v and a store for p, m, v; Adafactor's last pass
    has them for two vectors of p and g at a time; no generic or local access.
    """
    functions = re.split(r"Function : ", cuobjdump("-sass", "-arch", "sm_90a", library))
    names = (
        "ApplyAdamWILNS_9PrecisionE0E",
        "SumOfSquares",
        "adafactor_measureILNS_9PrecisionE0E",
        "adafactor_applyILNS_9PrecisionE0ELb0E",
    )
    adamw, squares, measure, apply = (next(f for f in functions if name in f.splitlines()[0]) for name in names)
    count = lambda code, name: len(re.findall(rf"\b{re.escape(name)}\b", code))
    assert (count(adamw, "LDG.E.128"), count(adamw, "STG.E.128")) == (4, 3)
    assert (count(apply, "LDG.E.128"), count(apply, "STG.E.128")) == (4, 2)
    assert count(squares, "LDG.E.128") == 4
    for code in (adamw, squares, measure, apply):
        assert not re.search(r"\b(LDL|STL|LD\.E|ST\.E)\b", code)


@pytest.mark.parametrize("source", ["multi_tensor", "panels"])
def test_logic_on_the_host(source, tmp_path):
    """Chunks, panels and strips cover every element once and so does the loop over a chunk, whatever sizes, dtypes and
    alignment; sums of squares hold from subnormals to the largest fp32; Adafactor's passes do what the formulas say.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither g++ nor clang++ was found")
    program = tmp_path / source
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        "-g",
        "-O1",
        "-ffp-contract=off",
    ]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *sanitizers, str(TESTS / f"{source}.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_a_launch_without_a_driver_says_so(library):
    one = torch.ones(4).data_ptr()
    for launch in _launches(native.cuda(), one):
        with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            launch()


def update(m, at, params=None, masters=(), keys=(), steps=None):
    """Of one tensor at an address, fp32 unless other parameters are given."""
    one = [(at, 0)]
    return m.Update(params or one, list(masters), list(keys), one, [at] if steps is None else steps, 0, 0)


def adafactor(m, lr=1e-3):
    return m.AdafactorOptions(lr, False, 0, 0.8, 0, 1e-30, 0, 1e-3, True, 1, 1, 0, 0, True)


def adam(m):
    return m.AdamOptions(1e-3, 0.9, 0.99, 1e-8, 0.1, 1, True)


def _launches(m, at):
    tensors = [(at, 0)]
    return (
        lambda: m.unscale(tensors, [4], at, at, 0, 0),
        lambda: m.grad_stats(tensors, [4], 0, 1.0, at, at, 0, 0),
        lambda: m.adamw(update(m, at), [4], tensors, tensors, adam(m), at, 0, 0),
        lambda: m.lamb(
            update(m, at), [4], tensors, tensors, adam(m), m.RatioOptions(True, False, 0, 9, 0, 9), at, 0, 0
        ),
        lambda: m.sgd(update(m, at), [4], [], m.SgdOptions(1e-3, 0, 0, 0, False), at, 0, 0),
        lambda: m.adafactor(update(m, at), [(1, 2, 2)], [at], [at], [], adafactor(m), at, 0, 0),
        # 16-bit remainders
        lambda: m.adamw(update(m, at, [(at, 1)], [(at, 3)]), [4], tensors, tensors, adam(m), at, 0, 0),
    )


def test_launchers_refuse_in_words(library):
    """Checks come before the first CUDA call, so they need no driver."""
    m, at = native.cuda(), 256
    for tensors, sizes, message in (
        ([(at, 0)], [4, 4], "grads has 1 tensors for 2 sizes"),
        ([(at, 0)], [-1], "a size is negative"),
        ([(0, 0)], [4], "grads holds a null address"),
        ([(at, 3)], [4], "grads holds a dtype that is not fp32, bf16 or fp16"),
        ([(at + 2, 0)], [4], "grads holds an address that is not a multiple of its element's size"),
    ):
        with pytest.raises(ValueError, match=message):
            m.unscale(tensors, sizes, at, at, 0, 0)
    with pytest.raises(ValueError, match="factor and found_inf must be given"):
        m.unscale([(at, 0)], [4], 0, at, 0, 0)
    with pytest.raises(ValueError, match="workspace is null"):
        m.grad_stats([(at, 0)], [4], 0, 1.0, at, 0, 0, 0)
    state = [[(at, 0)]] * 2
    for masters, keys, steps, workspace, message in (
        ((), (), [], at, "steps and params differ in number"),
        ((), (), [at], 0, "workspace is null"),
        ((), (), [0], at, "steps holds a null address"),
        ([(at, 0)], (), [at], at, "masters are fp32 of 16-bit parameters, or int16 remainders of bf16"),
        ((), [7], [at], at, "stochastic rounding is for bf16 parameters without master"),
    ):
        with pytest.raises(ValueError, match=message):
            m.adamw(update(m, at, None, masters, keys, steps), [4], *state, adam(m), workspace, 0, 0)
    for rows, columns, shape, message in (
        ([at], [], (1, 2, 2), "factors and params differ in number"),
        ([at], [0], (1, 2, 2), "a factor has a null address"),
        ([at], [at], (1, -2, 2), "a size is negative"),
        ([at], [at], (1, 2, 2**27 + 1), "over 2²⁷ columns"),
        ([at], [at], (2**20, 2**11, 2), "or 2³⁰ rows"),
    ):
        with pytest.raises(ValueError, match=message):
            m.adafactor(update(m, at), [shape], rows, columns, [], adafactor(m), at, 0, 0)


def test_the_workspace_of_adafactor(library):
    """Of the largest group of tensors, and for each a rule; the sums of a matrix's panels are the most of it, about a
    byte an element.
    """
    workspace = native.cuda().adafactor_workspace
    assert workspace([]) == 0
    block = [(1, 768, 768), (1, 768, 0)]
    assert 0 < workspace(100 * block) < 2 * 2**23 * 0.5
    assert workspace(100 * block) - workspace(99 * block) < 200
    assert 2**24 * 0.9 < workspace([(1, 2048, 8192)]) < 2**24 * 1.3
